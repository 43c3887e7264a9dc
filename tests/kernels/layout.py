"""Random placements of sequences over a ring, and what attention over them must give."""

from dataclasses import dataclass

import numpy as np
import torch
from ringserve_kernels import (
    AttentionSpec,
    KeyBlocks,
    KeyValues,
    RingSequence,
    RowSpan,
    plan_ring,
    reference_attention,
    ring_attention,
)
from ringserve_kernels.quantize import dequantize, quantize
from torch import Tensor

from tests.kernels.backends import TORCH, Backend
from tests.kernels.thread_ring import ThreadRing, run_ring


@dataclass
class Placed:
    """Sequences dealt over a ring: per rank a storage, and per sequence its rows and keys."""

    sequences: list[RingSequence]
    stores: list[KeyValues]
    queries: list[Tensor]
    expected: list[Tensor]

    def run(self, spec: AttentionSpec, segment: int,
            sink: Tensor | None = None) -> tuple[list[Tensor], list[ThreadRing]]:
        size = len(self.stores)

        def work(ring: ThreadRing) -> Tensor:
            plan = plan_ring(ring.rank, size, self.sequences, spec.window, segment,
                             granule=self.stores[0].layout.granule)
            return ring_attention(self.queries[ring.rank], self.stores[ring.rank], plan, spec, ring, sink)

        return run_ring(size, work)


def place(lengths: list[tuple[int, int]], size: int, spec: AttentionSpec, *, pass_q: list[bool],
          block: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32,
          holders: list[list[int]] | None = None, peak: float = 1.0, sink: Tensor | None = None,
          scatter: bool = False, backend: Backend = TORCH, stored: torch.dtype | None = None) -> Placed:
    """`lengths`: (cached, new) tokens per sequence; `holders`: rank of each block, else round-robin; `stored`: the
    format of the keys, if not the queries'."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    slots_needed = sum(-(-(cached + new) // block) for cached, new in lengths) + 2

    def storage() -> KeyValues:
        k, v = (normal(spec.num_kv_heads, slots_needed * block, dim) for dim in (spec.key_dim, spec.value_dim))
        if stored is None:
            return KeyValues(k, v, None, backend.layout(dtype, block))
        scales = [torch.full(k.shape[:2], torch.nan) for _ in range(2)]
        return KeyValues(k.to(stored), v.to(stored), (scales[0], scales[1]), backend.layout(dtype, block))

    stores = [storage() for _ in range(size)]
    free = [list(rng.permutation(slots_needed) if scatter else range(slots_needed)) for _ in range(size)]
    queries: list[list[Tensor]] = [[] for _ in range(size)]
    expected: list[list[Tensor]] = [[] for _ in range(size)]
    starts = [0] * size
    sequences = []
    for number, (cached, new) in enumerate(lengths):
        total = cached + new
        count = -(-total // block)
        owners = holders[number] if holders else [(b + number) % size for b in range(count)]
        k = normal(total, spec.num_kv_heads, spec.key_dim)
        v = normal(total, spec.num_kv_heads, spec.value_dim) + 0.5
        q = normal(total, spec.num_heads, spec.key_dim) * peak
        index = torch.arange(total)
        kept = [x if stored is None else dequantize(*quantize(x, stored), torch.float64) for x in (k, v)]
        o, _ = reference_attention(q[cached:], kept[0], kept[1], index[cached:], index, spec, sink)
        spans, keys = [], []
        for rank in range(size):
            mine = [b for b in range(count) if owners[b] == rank]
            slots = [free[rank].pop(0) for _ in mine]
            first = np.array([b * block for b in mine], dtype=np.int64)
            length = np.array([min(block, total - b * block) for b in mine], dtype=np.int64)
            keys.append(KeyBlocks(first, length, np.array(slots, dtype=np.int64) * block))
            rows = [t for t in range(cached, total) if owners[t // block] == rank]
            spans.append(RowSpan(starts[rank], np.array(rows, dtype=np.int64)))
            starts[rank] += len(rows)
            queries[rank].append(q[rows])
            expected[rank].append(o[[t - cached for t in rows]])
            for b, slot in zip(mine, slots):
                stop = min((b + 1) * block, total)
                where = torch.arange(slot * block, slot * block + stop - b * block)
                stores[rank].write(k[b * block:stop].transpose(0, 1), v[b * block:stop].transpose(0, 1), where)
        sequences.append(RingSequence(spans, keys, pass_q[number]))
    return Placed(sequences, stores, [torch.cat(q) for q in queries], [torch.cat(o) for o in expected])
