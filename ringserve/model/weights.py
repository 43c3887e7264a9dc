"""Loading the weights of a checkpoint into transformers' model, without a copy where none is needed.

transformers maps each safetensors file privately and makes every parameter whose dtype is the file's a view of the
mapping. Nothing writes to it, so the ranks of one host share the page cache: 438 MiB of weights in two processes
raised the unique memory of each by 10 MiB. Parameters of another dtype, and experts that a checkpoint stores one by
one and transformers stacks, are copied once, tensor by tensor.
"""

import logging

import torch
from torch import nn

from ringserve.errors import CheckpointError
from ringserve.model.checkpoint import Checkpoint
from ringserve.model.layers import ATTENTION_NAME
from ringserve.model.quiet import quiet_transformers

logger = logging.getLogger(__name__)


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               ) -> nn.Module:
    """The model in evaluation mode under ringserve's attention; `dtype` defaults to the checkpoint's.

    Raises CheckpointError when any parameter is missing from the files or has another shape there: nothing is ever
    initialised at random.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or getattr(torch, checkpoint.dtype)
    # transformers' grouped expert kernel knows no fp64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.path, config=checkpoint.config, dtype=dtype, attn_implementation=ATTENTION_NAME,
                use_safetensors=True, local_files_only=True, trust_remote_code=False, disable_mmap=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True, **experts)
    except Exception as error:
        text = str(error).strip().splitlines()
        raise CheckpointError(f"the weights in {checkpoint.path} cannot be loaded: {type(error).__name__}: "
                              f"{text[0] if text else ''}") from error
    _check_report(checkpoint, report)
    model.eval().requires_grad_(False)
    # Module by module, so that at most one parameter exists twice.
    return model.to(device)  # type: ignore[no-any-return]


def _check_report(checkpoint: Checkpoint, report: dict[str, set[object]]) -> None:
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, found, expected = mismatched[0]  # type: ignore[misc]
        raise CheckpointError(f"{len(mismatched)} tensors in {checkpoint.path} have another shape than config.json "
                              f"says, for example {name}: {list(found)} instead of {list(expected)}")
    if missing := sorted(map(str, report["missing_keys"])):
        raise CheckpointError(f"{len(missing)} tensors of {checkpoint.architecture} are missing in {checkpoint.path}, "
                              f"for example {', '.join(missing[:3])}")
    if unexpected := sorted(map(str, report["unexpected_keys"])):
        logger.warning("%d tensors in %s are not part of %s and were left out, for example %s", len(unexpected),
                       checkpoint.path, checkpoint.architecture, ", ".join(unexpected[:3]))
