"""KVCache: the keys and values of the blocks a rank holds, head-major per layer.

Shape suffixes: K kv heads, P tokens of the pool (slots x block_size), D head dim, T rows of the step.
A slot's tokens are adjacent, and so are adjacent slots: a run of slots is one contiguous run of keys per head.
"""

from collections.abc import Sequence

import numpy as np
import torch
from ringserve_kernels import AttentionSpec, KeyValues
from torch import Tensor


def key_bytes(specs: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    return sum(s.num_kv_heads * (s.key_dim + s.value_dim) * dtype.itemsize for s in specs)


class KVCache:
    def __init__(self, specs: Sequence[AttentionSpec], slots: int, block_size: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        tokens = slots * block_size
        self.layers = [
            KeyValues(_lazy_zeros((s.num_kv_heads, tokens, s.key_dim), dtype, device),
                      _lazy_zeros((s.num_kv_heads, tokens, s.value_dim), dtype, device)) for s in specs]

    def write(self, layer: int, k_KTD: Tensor, v_KTD: Tensor, where_T: Tensor) -> None:
        """Store the step's keys and values at these token offsets of the pool."""
        self.layers[layer].k_KPD.index_copy_(1, where_T, k_KTD)
        self.layers[layer].v_KPD.index_copy_(1, where_T, v_KTD)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose pages cost memory only once they are written (the system's zero pages)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
