"""Executes the index arithmetic of plans: which (row, key) pairs the tiles cover, and how often."""

import numpy as np
from numpy.typing import NDArray
from ringserve_kernels import AttentionPlan, KeyBlocks, RowSpan

Counts = NDArray[np.int64]


def covered(plan: AttentionPlan, tokens: int) -> Counts:
    """[rows, tokens of the storage]: how often each pair is attended."""
    counts = np.zeros((plan.rows, tokens), dtype=np.int64)
    for tile in plan.tiles.dense:
        counts[tile.row_start:tile.row_stop, tile.key_start:tile.key_stop] += 1
    for tiles in plan.tiles.gathered:
        n, t = tiles.rows_NT.shape
        valid = np.zeros(n * t, dtype=bool)
        valid[tiles.valid.numpy()] = True
        seen = tiles.visible_NTS.numpy() & valid.reshape(n, t)[:, :, None]
        tile, row, key = np.nonzero(seen)
        np.add.at(counts, (tiles.rows_NT.numpy()[tile, row], tiles.keys_NS.numpy()[tile, key]), 1)
    return counts


def visible_pairs(rows: int, tokens: int, sequences: list[tuple[RowSpan, KeyBlocks]],
                  window: int | None) -> Counts:
    """[rows, tokens]: 1 for each pair that must be attended, by brute force from the definition."""
    counts = np.zeros((rows, tokens), dtype=np.int64)
    for span, blocks in sequences:
        for first, length, offset in zip(blocks.first, blocks.length, blocks.offset):
            for within in range(length):
                distance = span.index - (first + within)
                seen = (distance >= 0) & (True if window is None else distance < window)
                counts[span.start:span.start + len(span.index), offset + within] += seen
    return counts
