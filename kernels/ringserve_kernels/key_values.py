"""KeyValues: where keys and values lie, be it a layer's part of the cache or a segment that came round the ring.

Shape suffixes: K kv heads, P tokens of the storage, T tokens written, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringserve_kernels.errors import DtypeError, ShapeError
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.quantize import LARGEST, dequantize, quantize


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """Blocks as the native kernel reads them (native/attention.h): of `block` tokens, `pack` of a product's steps
    side by side. Only that kernel reads and writes them; whole blocks may be copied by anybody."""

    kernel: NativeKernel
    block: int
    pack: int
    """2 for bf16 queries, 1 for fp32."""

    def check(self, dtype: torch.dtype, tokens: int) -> None:
        """Raises ArgumentError unless queries of `dtype` read a storage of so many tokens in this layout."""
        wanted = torch.float32 if self.pack == 1 else torch.bfloat16
        if dtype != wanted:
            raise DtypeError("q_THD", dtype, f"{wanted}, for which the keys were laid out")
        if tokens % self.block:
            raise ShapeError("k_KPD", f"of {tokens} tokens", f"whole blocks of {self.block}")


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Head-major, so that the keys of one head in adjacent slots are one contiguous run."""

    k_KPD: Tensor
    v_KPD: Tensor
    scales_KP: tuple[Tensor, Tensor] | None = None
    """Of quantized keys and values (`quantize`), fp32."""
    layout: NativeLayout | None = None
    """None: token after token."""

    @property
    def granule(self) -> int:
        """Tokens that must stay together when they are copied."""
        return self.layout.block if self.layout else 1

    @property
    def parts(self) -> list[Tensor]:
        """All that belongs to a token, as tensors [K, P, something] that any copy may move. The scales stand first,
        so that they are aligned in a message."""
        codes = [self.k_KPD, self.v_KPD]
        if self.scales_KP is None:
            return codes
        return [x.unsqueeze(-1) for x in self.scales_KP] + [x.view(torch.uint8) for x in codes]

    @property
    def token_bytes(self) -> int:
        """Of one token's key and value, over all heads."""
        return sum(part.shape[0] * part.shape[2] * part.element_size() for part in self.parts)

    def laid_over(self, message: Tensor) -> "KeyValues":
        """A message of the ring, uint8 [tokens * token_bytes], as keys and values like these: one part after the
        other, each head-major. `tokens` is a multiple of `granule`."""
        tokens = len(message) // self.token_bytes
        laid: list[Tensor] = []
        start = 0
        for part in self.parts:
            heads, _, width = part.shape
            stop = start + heads * tokens * width * part.element_size()
            laid.append(message[start:stop].view(part.dtype).view(heads, tokens, width))
            start = stop
        k, v = laid[-2].view(self.k_KPD.dtype), laid[-1].view(self.v_KPD.dtype)
        return KeyValues(k, v, (laid[0].squeeze(-1), laid[1].squeeze(-1)) if self.scales_KP else None, self.layout)

    def write(self, k_KTD: Tensor, v_KTD: Tensor, where_T: Tensor) -> None:
        """Store keys and values at these token offsets (int64), quantized if that is how they lie here."""
        if self.scales_KP is not None:
            for x, own, scale_KP in zip((k_KTD, v_KTD), (self.k_KPD, self.v_KPD), self.scales_KP):
                codes, scale = quantize(x, own.dtype)
                scale_KP.index_copy_(1, where_T, scale)
                self._place(codes, own, where_T)
            return
        self._place(k_KTD, self.k_KPD, where_T)
        self._place(v_KTD, self.v_KPD, where_T)

    def _place(self, x_KTD: Tensor, own_KPD: Tensor, where_T: Tensor) -> None:
        if self.layout is not None:
            self.layout.kernel.store(x_KTD, own_KPD, where_T, block=self.layout.block, pack=self.layout.pack,
                                     is_value=own_KPD is self.v_KPD)
        elif own_KPD.dtype in LARGEST:
            own_KPD.view(torch.uint8).index_copy_(1, where_T, x_KTD.view(torch.uint8))
        else:
            own_KPD.index_copy_(1, where_T, x_KTD)

    def read(self, tokens: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these tokens in `dtype`, (k_KSD, v_KSD): as they lie (no copy) for a slice that is not
        quantized. Only token after token."""
        assert self.layout is None, "blocks of the native kernel are read by it alone"
        k, v = _take(self.k_KPD, tokens), _take(self.v_KPD, tokens)
        if self.scales_KP is None:
            return k, v
        k_scale, v_scale = (_take(scale, tokens) for scale in self.scales_KP)
        return dequantize(k, k_scale, dtype), dequantize(v, v_scale, dtype)


def _take(x: Tensor, tokens: slice | Tensor) -> Tensor:
    if isinstance(tokens, slice):
        return x[:, tokens]
    if x.dtype in LARGEST:
        return x.view(torch.uint8).index_select(1, tokens).view(x.dtype)
    return x.index_select(1, tokens)
