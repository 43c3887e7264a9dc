"""From a checkpoint to a model that may be served: loaded, frequencies fixed, and found to be what we compute."""

import torch
from torch import nn

from ringserve.model.checkpoint import Checkpoint
from ringserve.model.checks import check_against_eager, check_no_other_mixing, check_positions
from ringserve.model.layers import AttentionLayer, record_layers
from ringserve.model.masks import check_masks
from ringserve.model.rope import fix_frequencies
from ringserve.model.weights import load_model


def load_checked(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype,
                 ) -> tuple[nn.Module, list[AttentionLayer]]:
    """The model and its attention layers. Raises CheckpointError or UnsupportedModelError with the reason."""
    model = load_model(checkpoint, device, dtype)
    fix_frequencies(model, checkpoint.max_model_len)
    layers = record_layers(model)
    check_no_other_mixing(model)
    check_positions(model)
    check_masks(model, layers, checkpoint.max_model_len)
    check_against_eager(model, layers)
    return model, layers
