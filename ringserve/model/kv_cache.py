"""KVCache: the keys and values of the blocks a rank holds, head-major per layer.

Shape suffixes: K kv heads, P tokens of the pool (slots x block_size), D head dim, T rows of the step.
A slot's tokens are adjacent, and so are adjacent slots: a run of slots is one contiguous run of keys per head.
"""

from collections.abc import Sequence

import numpy as np
import torch
from ringserve_kernels import AttentionSpec, KeyValues, Layout
from torch import Tensor

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What `kv_cache_dtype` says, but for `auto`: the model's own number format."""
SCALE_BYTES = 4


def key_bytes(spec: AttentionSpec, dtype: torch.dtype) -> int:
    """Bytes of one token's key and value in one layer, stored as `dtype`."""
    scales = 2 * SCALE_BYTES if dtype in STORED.values() else 0
    return spec.num_kv_heads * ((spec.key_dim + spec.value_dim) * dtype.itemsize + scales)


class KVCache:
    def __init__(self, specs: Sequence[AttentionSpec], layouts: Sequence[Layout], slots: int,
                 block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """`dtype` is what numbers are stored as; `layouts` how each layer's blocks lie."""
        self.layers = [_storage(spec, layout, slots * block_size, dtype, device)
                       for spec, layout in zip(specs, layouts)]

    def write(self, layer: int, k_KTD: Tensor, v_KTD: Tensor, where_T: Tensor) -> None:
        """Store the step's keys and values at these token offsets of the pool."""
        self.layers[layer].write(k_KTD, v_KTD, where_T)


def _storage(spec: AttentionSpec, layout: Layout, tokens: int, dtype: torch.dtype,
             device: torch.device) -> KeyValues:
    heads = spec.num_kv_heads
    k, v = (_lazy_zeros((heads, tokens, dim), dtype, device) for dim in (spec.key_dim, spec.value_dim))
    scales = None
    if dtype in STORED.values():
        scales = (_lazy_zeros((heads, tokens), torch.float32, device),
                  _lazy_zeros((heads, tokens), torch.float32, device))
    return KeyValues(k, v, scales, layout)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages cost memory only once they are written (the system's zero pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
