"""KeyValues: where keys and values lie, be it a layer's part of the cache or a segment that came round the ring.

Shape suffixes: K kv heads, P tokens of the storage, T tokens written, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ringserve_kernels.errors import DeviceError, DtypeError, ShapeError, StrideError
from ringserve_kernels.layout import Layout
from ringserve_kernels.quantize import LARGEST, dequantize, quantize
from ringserve_kernels.tile_layout import TILES


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Head-major, so that the keys of one head in adjacent slots are one contiguous run. Raises ArgumentError for
    tensors that cannot be one storage."""

    k_KPD: Tensor
    v_KPD: Tensor
    scales_KP: tuple[Tensor, Tensor] | None = None
    """Of quantized keys and values (`quantize`), fp32."""
    layout: Layout = TILES

    def __post_init__(self) -> None:
        k, v = self.k_KPD, self.v_KPD
        if k.dim() != 3:
            raise ShapeError("k_KPD", tuple(k.shape), "(heads, tokens, dim)")
        if v.dim() != 3 or v.shape[:2] != k.shape[:2]:
            raise ShapeError("v_KPD", tuple(v.shape), f"({k.shape[0]}, {k.shape[1]}, dim), as k_KPD has")
        if v.dtype != k.dtype:
            raise DtypeError("v_KPD", v.dtype, f"k_KPD's, {k.dtype}")
        if v.device != k.device:
            raise DeviceError("v_KPD", f"on {v.device}", f"k_KPD's, {k.device}")
        if (k.dtype in LARGEST) != (self.scales_KP is not None):
            raise DtypeError("k_KPD", f"{k.dtype} with{'' if self.scales_KP else 'out'} scales",
                             f"{', '.join(map(str, LARGEST))} with scales, others without")
        for scale in self.scales_KP or ():
            if scale.shape != k.shape[:2] or scale.dtype != torch.float32 or scale.stride(1) != 1:
                raise StrideError("scales_KP", f"{tuple(scale.shape)} of {scale.dtype}, strided by {scale.stride()}",
                                  f"{tuple(k.shape[:2])} of torch.float32, the tokens of a head adjacent")
        self.layout.check_storage("k_KPD", k)
        self.layout.check_storage("v_KPD", v)

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
        other, each head-major. `tokens` is a multiple of the layout's granule."""
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
        """Store keys and values at these token offsets (int64), quantized if that is how they lie here.

        Raises ArgumentError for another shape or dtype; for an offset outside the storage what the layout raises."""
        for name, x, own in (("k_KTD", k_KTD, self.k_KPD), ("v_KTD", v_KTD, self.v_KPD)):
            shape = (own.shape[0], len(where_T), own.shape[2])
            if tuple(x.shape) != shape:
                raise ShapeError(name, tuple(x.shape), shape)
            if self.scales_KP is None and x.dtype != own.dtype:
                raise DtypeError(name, x.dtype, f"the storage's, {own.dtype}")
        if where_T.dtype != torch.int64:
            raise DtypeError("where_T", where_T.dtype, torch.int64)
        if self.scales_KP is not None:
            codes = []
            for x, own, scale_KP in zip((k_KTD, v_KTD), (self.k_KPD, self.v_KPD), self.scales_KP):
                quantized, scale = quantize(x, own.dtype)
                scale_KP.index_copy_(1, where_T, scale)
                codes.append(quantized)
            k_KTD, v_KTD = codes
        self.layout.write(k_KTD, self.k_KPD, where_T, is_value=False)
        self.layout.write(v_KTD, self.v_KPD, where_T, is_value=True)

    def read(self, tokens: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these tokens in `dtype`, (k_KSD, v_KSD): as they lie (no copy) for a slice that is not
        quantized. Only token after token."""
        assert self.layout.granule == 1, "blocks of another order are read by their layout alone"
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
