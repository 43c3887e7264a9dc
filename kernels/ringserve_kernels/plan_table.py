"""PlanTable: rows and blocks of a step as flat arrays, for kernels that read the cache in blocks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PlanTable:
    """n sequences. All arrays are int64 and adjacent in memory."""

    row_start: NDArray[np.int64]
    """[n] first row in q."""
    row_count: NDArray[np.int64]
    """[n]"""
    index_start: NDArray[np.int64]
    """[n] where a sequence's part of `row_index` begins."""
    row_index: NDArray[np.int64]
    """Token indices of the rows, ascending within a sequence."""
    block_start: NDArray[np.int64]
    """[n + 1] where a sequence's part of the arrays below begins."""
    first: NDArray[np.int64]
    """Token index of each block's first key, ascending within a sequence."""
    length: NDArray[np.int64]
    """Keys in each block."""
    place: NDArray[np.int64]
    """Number of each block in the storage."""
    window: int | None

    @property
    def is_empty(self) -> bool:
        return not (len(self.row_index) and len(self.first))
