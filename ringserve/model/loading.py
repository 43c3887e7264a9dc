"""From a checkpoint to a model that may be served: loaded, frequencies fixed, and found to be what we compute."""

import torch
from torch import nn

from ringserve.errors import UnsupportedModelError
from ringserve.model.checkpoint import Checkpoint
from ringserve.model.checks import check_against_eager, check_no_other_mixing, check_positions
from ringserve.model.layers import AttentionLayer, record_layers
from ringserve.model.masks import check_masks
from ringserve.model.memory import free_bytes
from ringserve.model.rope import fix_frequencies
from ringserve.model.weights import load_model


def load_checked(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype,
                 ) -> tuple[nn.Module, list[AttentionLayer]]:
    """The model and its attention layers. Raises CheckpointError or UnsupportedModelError with the reason."""
    _check_fits(checkpoint, device, dtype)
    model = load_model(checkpoint, device, dtype)
    fix_frequencies(model, checkpoint.max_model_len)
    layers = record_layers(model)
    check_no_other_mixing(model)
    check_positions(model)
    check_masks(model, layers, checkpoint.max_model_len)
    check_against_eager(model, layers)
    return model, layers


def _check_fits(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """A rank is one device, so far: a model that is larger than it cannot be served."""
    stored = getattr(torch, checkpoint.stored_dtype).itemsize
    needed, free = checkpoint.weight_bytes * dtype.itemsize // stored, free_bytes(device)
    if needed > free:
        raise UnsupportedModelError(f"the weights of {checkpoint.path} need {needed / 2**30:.1f} GiB as {dtype}, and "
                                    f"{device} has {free / 2**30:.1f} GiB free: a model must fit one rank's device")
