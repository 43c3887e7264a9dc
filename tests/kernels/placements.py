"""Random placements: sequences whose blocks, slots, rows and holes are drawn, without any tensor."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from ringserve_kernels import KeyBlocks, RingSequence, RowSpan


@dataclass
class Placement:
    """Sequences on the ranks of a ring, each rank with a storage of `tokens` tokens."""

    size: int
    tokens: int
    sequences: list[RingSequence]


@st.composite
def placements(draw: st.DrawFn, ranks: st.SearchStrategy[int], lengths: st.SearchStrategy[tuple[int, int]],
               most: int = 4) -> Placement:
    """Blocks go to random holders and slots (adjacent ones or not), some ranks stay idle. With holes, some
    blocks are not computed yet and the rows are anywhere."""
    size = draw(ranks)
    block = draw(st.sampled_from([1, 4, 16, 64]))
    wanted = draw(st.lists(lengths, min_size=1, max_size=most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scatter, holes = draw(st.booleans()), draw(st.booleans())
    idle = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    holding = [rank for rank in range(size) if rank not in idle]
    slots = sum(-(-(cached + new) // block) for cached, new in wanted) + 1
    free = [rng.permutation(slots) if scatter else np.arange(slots) for _ in range(size)]
    used, starts = [0] * size, [0] * size
    sequences = []
    for cached, new in wanted:
        total = cached + new
        owners = rng.choice(holding, size=-(-total // block))
        rows = np.arange(cached, total)
        if holes:
            rows = np.sort(rng.choice(total, size=max(1, min(new, total // 2)), replace=False))
        spans, keys = [], []
        for rank in range(size):
            mine = np.flatnonzero(owners == rank)
            offset = free[rank][used[rank]:used[rank] + len(mine)].astype(np.int64) * block
            used[rank] += len(mine)
            there = (rng.random(len(mine)) < 0.8) | np.isin(mine, rows // block) if holes else mine >= 0
            keys.append(KeyBlocks(mine * block, np.minimum(block, total - mine * block), offset).take(there))
            index = rows[owners[rows // block] == rank].astype(np.int64)
            spans.append(RowSpan(starts[rank], index))
            starts[rank] += len(index)
        sequences.append(RingSequence(spans, keys, draw(st.booleans())))
    return Placement(size, slots * block, sequences)


def windows() -> st.SearchStrategy[int | None]:
    return st.sampled_from([None, None, 1, 5, 64, 200, 5000])
