"""Dense operations for GPUs: every row of a rectangle sees every key of it. What each does differently (order of the
axes, shape and padding of its lse) is made good here.

Shape suffixes: N = 1, K kv heads, R packed rows (the query heads of a kv head, times rows), S keys, D head dim.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Dense = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(q_NKRD, k_NKSD, v_NKSD, scale) -> (o_NKRD, lse_NKR); lse is fp32, natural logarithm."""

Capability = tuple[int, int]
"""Of a CUDA device, as (9, 0) for sm_90."""


@dataclass(frozen=True)
class DenseOperation:
    name: str
    run: Dense
    distribution: str
    """The package that brings it."""
    module: str
    least: Capability
    before: Capability = (99, 0)
    """The first capability that it does not support."""
    fixed_shapes: bool = False
    """It plans for each new shape, for up to a second: it must be called with few."""

    def missing(self, capability: Capability) -> str | None:
        """Why it cannot be used on such a device, or None."""
        if not self.least <= capability < self.before:
            upper = "" if self.before == (99, 0) else f" and before sm_{self.before[0]}{self.before[1]}"
            return f"needs sm_{self.least[0]}{self.least[1]}{upper}"
        if not _installed(self.module):
            return f"{self.distribution} is not installed"
        return None

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return o, lse.reshape(q.shape[:3])  # [N, K, R, 1] in some versions


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return o, lse


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return o, lse[:, :, :q.shape[2]]  # padded to 32 rows


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    o, lse = flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale, return_attn_probs=True)[:2]
    return o.transpose(1, 2), lse


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func

    o, lse = flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale, return_attn_probs=True)[:2]
    return o.transpose(1, 2), lse


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func

    o, lse = flash_attn_func(*_tokens_first(q, k, v), softmax_scale=scale, return_lse=True)[:2]
    return o.transpose(1, 2), lse


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    """[N, K, tokens, D] as flash-attn takes it: [N, tokens, K, D]."""
    return [x.transpose(1, 2) for x in tensors]


TORCH_FLASH = DenseOperation("flash", _torch_flash, "torch", "torch", (8, 0))
OPERATIONS = (
    DenseOperation("cudnn", _cudnn, "torch", "torch", (8, 0), fixed_shapes=True),
    DenseOperation("fa3", _flash_attn_3, "flash-attn-3", "flash_attn_interface", (9, 0), (10, 0)),
    DenseOperation("fa4", _flash_attn_4, "flash-attn-4", "flash_attn.cute", (9, 0)),
    DenseOperation("fa2", _flash_attn_2, "flash-attn", "flash_attn.flash_attn_interface", (8, 0)),
    TORCH_FLASH,  # torch's own build of FlashAttention 2
    DenseOperation("efficient", _efficient, "torch", "torch", (5, 0)),
)
"""In the order in which they are tried."""
