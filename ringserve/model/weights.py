"""Loading the weights of a checkpoint into transformers' model, without a copy where none is needed.

transformers maps each safetensors file privately and makes every parameter whose dtype is the file's a view
of the mapping. Nothing writes to it, so the ranks of one host share the page cache: reading all of 438 MiB of
weights in two processes adds nothing to the memory that is either's alone. Parameters of another dtype, and
experts that a checkpoint stores one by one and transformers stacks, are copied once, tensor by tensor.
"""

import logging
from typing import Any

import torch
from torch import nn

from ringserve.errors import CheckpointError, UnsupportedModelError
from ringserve.model.checkpoint import Checkpoint
from ringserve.model.layers import ATTENTION_NAME
from ringserve.model.quiet import first_line, quiet_transformers

logger = logging.getLogger(__name__)


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
               ) -> nn.Module:
    """The model in evaluation mode under ringserve's attention; `dtype` defaults to the checkpoint's.

    Raises UnsupportedModelError when transformers gives the architecture no replaceable attention, and
    CheckpointError when any parameter is missing from the files or has another shape there: nothing is
    ever initialised at random.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]._supports_attention_backend:
        raise UnsupportedModelError(
            f"{checkpoint.architecture} has no attention that can be run over the ring: transformers marks it as "
            "having a recurrent state or attention of its own")
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
        # transformers stacks experts stored one by one; what it says of a failure refers to a report that is silenced.
        incomplete = "automatic conversion" in str(error)
        reason = "the experts of a layer are not all there, or differ in shape" if incomplete else first_line(error)
        raise CheckpointError(f"the weights in {checkpoint.path} cannot be loaded: {reason}") from error
    _check_report(checkpoint, report)
    model.eval().requires_grad_(False)
    # Module by module, so that at most one parameter exists twice.
    return model.to(device)  # type: ignore[no-any-return]


def _check_report(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    path, architecture = checkpoint.path, checkpoint.architecture
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, found, expected = mismatched[0]
        raise CheckpointError(f"{len(mismatched)} tensors in {path} have another shape than config.json "
                              f"says, for example {name}: {list(found)} instead of {list(expected)}")
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{len(missing)} tensors of {architecture} are missing in {path}, for example "
                              f"{', '.join(missing[:3])}")
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning("%d tensors in %s are not part of %s and were left out, for example %s",
                       len(unexpected), path, architecture, ", ".join(unexpected[:3]))
