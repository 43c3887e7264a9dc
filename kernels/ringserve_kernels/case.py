"""Case: a small attention problem on random tensors, to check and to time a kernel with."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringserve_kernels.attend import attend
from ringserve_kernels.attention_plan import KeyBlocks, RowSpan, plan_attention
from ringserve_kernels.key_values import KeyValues
from ringserve_kernels.layout import Layout
from ringserve_kernels.merge import State
from ringserve_kernels.reference import reference_attention
from ringserve_kernels.spec import AttentionSpec

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """The last rows of one sequence, over all its keys."""

    spec: AttentionSpec
    dtype: torch.dtype
    rows: int
    keys: int
    block: int
    device: torch.device = CPU

    @property
    def flops(self) -> float:
        """Of the two products, as if every row saw every key."""
        return 2.0 * self.spec.num_heads * self.rows * self.keys * (self.spec.key_dim + self.spec.value_dim)

    def run(self, layout: Layout) -> Callable[[], State]:
        """The attention as a call, its tensors made and written."""
        q, k, v = self.tensors()
        count = -(-self.keys // self.block)
        k_KPD, v_KPD = (x.new_zeros(x.shape[1], count * self.block, x.shape[2]) for x in (k, v))
        store = KeyValues(k_KPD, v_KPD, layout=layout)
        store.write(k.transpose(0, 1), v.transpose(0, 1), torch.arange(self.keys, device=self.device))
        first = np.arange(count, dtype=np.int64) * self.block
        blocks = KeyBlocks(first, np.minimum(self.block, self.keys - first), first)
        plan = plan_attention(self.rows, [(RowSpan(0, self.row_index), blocks)], self.spec.window,
                              self.device)
        return lambda: attend(q, store, plan, self.spec)

    def expected(self) -> State:
        q, k, v = (x.cpu() for x in self.tensors())
        return reference_attention(q, k, v, torch.from_numpy(self.row_index), torch.arange(self.keys), self.spec)

    @property
    def row_index(self) -> NDArray[np.int64]:
        return np.arange(self.keys - self.rows, self.keys, dtype=np.int64)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        spec = self.spec

        def normal(tokens: int, heads: int, dim: int) -> Tensor:
            return torch.randn(tokens, heads, dim, generator=generator).to(self.device)

        q = normal(self.rows, spec.num_heads, spec.key_dim)
        k = normal(self.keys, spec.num_kv_heads, spec.key_dim)
        v = normal(self.keys, spec.num_kv_heads, spec.value_dim) + 0.5
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
