"""transformers' eager attention over quantized keys and values: the oracle of a quantized cache.

What the format loses is then in the oracle too, so the ring can be held to the same bounds as without, and the loss
itself is the distance between this oracle and plain eager attention.
"""

import sys
from functools import partial
from typing import Any

import torch
from ringserve_kernels.quantize import dequantize, quantize
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ringserve.model.kv_cache import STORED


def eager_name(kv_cache_dtype: str) -> str:
    """What transformers calls the attention of this cache format."""
    return "eager" if kv_cache_dtype == "auto" else f"eager_{kv_cache_dtype}"


def _attention(stored: torch.dtype, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
               attention_mask: Tensor | None, **options: Any) -> Any:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, _kept(key, stored), _kept(value, stored), attention_mask, **options)


def _kept(x_1KTD: Tensor, stored: torch.dtype) -> Tensor:
    """What a cache of this format knows of these numbers."""
    return dequantize(*quantize(x_1KTD, stored), x_1KTD.dtype)


for _name, _stored in STORED.items():
    AttentionInterface.register(eager_name(_name), partial(_attention, _stored))
    AttentionMaskInterface.register(eager_name(_name), eager_mask)
