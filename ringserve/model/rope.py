"""Rotary frequencies: fixed when the model loads, and angles that stay right beyond a million positions.

transformers computes `position.float() * inv_freq` in fp32. At ten million one unit in the last place of that
product is a whole radian, so from EXACT_BELOW on the rows of cos and sin are computed in fp64 from the same
frequencies. Rows below it keep transformers' numbers bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ringserve.errors import UnsupportedModelError
from ringserve.model.context_length import DYNAMIC_REASON

EXACT_BELOW = 1 << 20


def fix_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Makes every rotary module's frequencies independent of the positions of a call.

    longrope has a short and a long set, chosen here once by `max_model_len`. When the context reaches beyond
    EXACT_BELOW, the far rows are computed in fp64.
    """
    for name, module in model.named_modules():
        if "inv_freq" not in {buffer.split("_", 1)[-1][-8:] for buffer in module._buffers}:
            continue
        for layer_type in _layer_types(module):
            _fix_rope_type(module, layer_type, max_model_len)
        if max_model_len > EXACT_BELOW:
            _extend(name, module)


def _layer_types(module: nn.Module) -> list[str | None]:
    """The keys of the module's frequency sets: [None] for the usual one, or one per layer type (Gemma 3)."""
    names = [name for name in module._buffers if name.endswith("inv_freq") and not name.endswith("original_inv_freq")]
    return [name.removesuffix("inv_freq").removesuffix("_") or None for name in names]
