"""AttentionPlan: a rank's attention of one step, and how it is cut into tiles. Built once per step, for every layer.

The native kernel reads rows and blocks as they are (`table`). For torch's operations all decisions are made here
(`tiles`), on the host, from token indices alone:

    keys of one sequence on this rank, by index        rows of the chunk: r0 .. r1
    [ past: at or before r0            ][ frontier: r0 .. r1 ]
      long runs of adjacent slots:        tiles of rows; per tile the long runs before its
      dense, no mask, no copy             first row are dense too, the rest is gathered and
                                          masked by index, tiles of equal shape in one call

A window layer gathers, per tile of rows, only the keys inside the window.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringserve_kernels.errors import ShapeError
from ringserve_kernels.merge import Rows
from ringserve_kernels.plan_table import PlanTable

Ints = NDArray[np.int64]
T = TypeVar("T")

TILE_ROWS = 256
DENSE_KEYS = 512
"""Shorter runs are gathered: below this the dense op's own cost per call dominates."""

MOST_KEYS = 16_384
"""In one dense call: backends copy the keys into a layout of their own, and memory must not grow with the prompt."""


@dataclass(frozen=True)  # without slots: what costs a pass over all blocks is found once
class KeyBlocks:
    """Blocks of keys of one sequence in one storage, in ascending order of token index."""

    first: Ints
    """[n] token index of each block's first key."""
    length: Ints
    """[n] keys in each block."""
    offset: Ints
    """[n] where each block's keys begin on the token axis of the storage."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def take(self, which: "slice | NDArray[np.bool_]") -> "KeyBlocks":
        if isinstance(which, slice) and which.indices(len(self)) == (0, len(self), 1):
            return self
        return KeyBlocks(self.first[which], self.length[which], self.offset[which])

    def followed_by(self, later: "KeyBlocks") -> "KeyBlocks":
        if not len(self) or not len(later):
            return self if len(self) else later
        return KeyBlocks(*(np.concatenate((getattr(self, name), getattr(later, name)))
                           for name in ("first", "length", "offset")))

    def num_until(self, index: int) -> int:
        """How many blocks have their last key at or before this token index."""
        n = int(np.searchsorted(self.first, index, side="right"))
        return n - 1 if n and self.first[n - 1] + self.length[n - 1] - 1 > index else n

    def in_reach(self, row_index: Ints, window: int | None) -> "KeyBlocks":
        """The blocks with at least one key that at least one of these rows (ascending) may see."""
        if len(row_index) == 0 or len(self) == 0:
            return self.take(slice(0, 0))
        stop = int(np.searchsorted(self.first, row_index[-1], side="right"))
        start = 0 if window is None else self.num_until(int(row_index[0]) - window)
        return self.take(slice(start, max(start, stop)))

    @cached_property
    def run_edges(self) -> Ints:
        """[runs + 1] Blocks edges[i] .. edges[i+1] - 1 are adjacent in the storage."""
        cuts = np.flatnonzero(self.offset[1:] != self.offset[:-1] + self.length[:-1]) + 1
        return np.concatenate(([0], cuts, [len(self)])) if len(self) else np.zeros(1, dtype=np.int64)

    def runs(self) -> list[tuple[int, int]]:
        """(offset, length) of the stretches that are contiguous in the storage, in order."""
        offset, length = self._runs
        return list(zip(offset.tolist(), length.tolist()))

    @cached_property
    def _runs(self) -> tuple[Ints, Ints]:
        edges = self.run_edges
        offset, last = self.offset[edges[:-1]], edges[1:] - 1
        return offset, self.offset[last] + self.length[last] - offset

    def without_runs(self, long: int) -> "KeyBlocks":
        """The blocks of the runs of fewer than `long` keys."""
        short = self._runs[1] < long
        return self.take(np.repeat(short, np.diff(self.run_edges)) if short.any() else slice(0, 0))

    def keys(self) -> tuple[Ints, Ints]:
        """(token index, storage offset) of every single key, ascending."""
        within = np.arange(self.tokens) - np.repeat(np.cumsum(self.length) - self.length, self.length)
        return np.repeat(self.first, self.length) + within, np.repeat(self.offset, self.length) + within


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of one sequence: consecutive in q from `start`, with these token indices, ascending."""

    start: int
    index: Ints


@dataclass(frozen=True, slots=True)
class DenseTile:
    """Rows [row_start, row_stop) see all keys [key_start, key_stop) of the storage."""

    row_start: int
    row_stop: int
    key_start: int
    key_stop: int


@dataclass(slots=True)
class GatheredTiles:
    """N tiles of equal shape: their rows and keys are gathered, a mask says what each row sees."""

    rows_NT: Tensor
    """int64, row of q; padding repeats row 0 and is dropped by `valid`."""
    keys_NS: Tensor
    """int64, offset in the storage; padding repeats the tile's first key and is masked: what lies elsewhere may be
    another sequence's, even NaN, and 0 * NaN is NaN."""
    visible_NTS: Tensor
    valid: Tensor
    """int64: which of the flattened N*T rows are real."""
    target: Rows
    """The rows of q that the real ones are, in that order."""
    bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias_NTS(self, dtype: torch.dtype) -> Tensor:
        """The mask as 0 / -inf, made once per step and dtype."""
        if dtype not in self.bias:
            zero = torch.zeros(self.visible_NTS.shape, dtype=dtype, device=self.visible_NTS.device)
            self.bias[dtype] = zero.masked_fill(~self.visible_NTS, -torch.inf)
        return self.bias[dtype]


@dataclass(frozen=True, slots=True)
class Tiles:
    dense: list[DenseTile]
    gathered: list[GatheredTiles]


@dataclass(frozen=True)  # without slots: the forms below are made when a kernel asks for them
class AttentionPlan:
    rows: int
    """Of q."""
    sequences: list[tuple[RowSpan, KeyBlocks]]
    """Rows, and the blocks of which they may see a key; neither is empty."""
    window: int | None
    device: torch.device
    _forms: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        return not self.sequences

    @cached_property
    def storage_tokens(self) -> int:
        """Tokens that the storage must have at least."""
        return max((int((blocks.offset + blocks.length).max()) for _, blocks in self.sequences), default=0)

    @cached_property
    def tiles(self) -> Tiles:
        """For operations that know one rectangle of rows and keys, or a mask."""
        return _cut(self)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """A form of the plan that a kernel asks for, made when it is asked for first: every layer has the same plan."""
        if key not in self._forms:
            self._forms[key] = make()
        form: T = self._forms[key]
        return form

    def table(self, block: int) -> PlanTable:
        """For kernels that read a storage in blocks of so many tokens. Raises ShapeError when a block of the plan does
        not begin with a block of the storage or is longer, or a row is none of q's."""
        return self.once(("table", block), lambda: _tabulate(self, block))

    def without_runs(self, least_rows: int) -> "tuple[list[DenseTile], AttentionPlan]":
        """The long runs of keys before all rows of a sequence, and the plan of what is left: for operations that are
        good at rectangles beside one that can do anything. Sequences of fewer rows, or with keys behind their window,
        are left as they are."""
        dense: list[DenseTile] = []
        left: list[tuple[RowSpan, KeyBlocks]] = []
        for span, blocks in self.sequences:
            if len(span.index) >= least_rows and not _crosses(span, blocks, self.window):
                past = blocks.num_until(int(span.index[0]))
                short = _dense(span, 0, len(span.index), blocks.take(slice(0, past)), dense)
                blocks = short.followed_by(blocks.take(slice(past, None)))
            if len(blocks):
                left.append((span, blocks))
        return dense, AttentionPlan(self.rows, left, self.window, self.device)


@dataclass(slots=True)
class _Tile:
    rows: Ints
    row_index: Ints
    key_index: Ints
    key_offset: Ints


def plan_attention(rows: int, sequences: Iterable[tuple[RowSpan, KeyBlocks]], window: int | None,
                   device: torch.device | None = None) -> AttentionPlan:
    """The attention of a ragged batch. `rows` is the number of rows of q."""
    reaching = [(span, blocks.in_reach(span.index, window)) for span, blocks in sequences]
    return AttentionPlan(rows, [(span, blocks) for span, blocks in reaching if len(blocks)], window,
                         device or torch.device("cpu"))


def _tabulate(plan: AttentionPlan, block: int) -> PlanTable:
    spans, blocks = [s for s, _ in plan.sequences], [b for _, b in plan.sequences]
    counts = np.array([len(s.index) for s in spans], dtype=np.int64)
    for span in spans:
        if span.start < 0 or span.start + len(span.index) > plan.rows:
            raise ShapeError("start", f"{span.start} of {len(span.index)} rows", f"within the {plan.rows} rows of q")
    offset, length = _joined([b.offset for b in blocks]), _joined([b.length for b in blocks])
    if (wrong := (offset % block != 0) | (offset < 0)).any():
        raise ShapeError("offset", offset[wrong][:8], f"multiples of the block's {block} tokens")
    if (wrong := (length < 1) | (length > block)).any():
        raise ShapeError("length", length[wrong][:8], f"1 to {block} tokens")
    return PlanTable(
        row_start=np.array([s.start for s in spans], dtype=np.int64), row_count=counts,
        index_start=np.cumsum(counts) - counts, row_index=_joined([s.index for s in spans]),
        block_start=np.cumsum([0, *(len(b) for b in blocks)], dtype=np.int64),
        first=_joined([b.first for b in blocks]), length=length, place=offset // block,
        window=plan.window)


def _joined(parts: list[Ints]) -> Ints:
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.int64) if parts else np.zeros(0, dtype=np.int64)


def _cut(plan: AttentionPlan) -> Tiles:
    dense: list[DenseTile] = []
    tiles: list[_Tile] = []
    for span, blocks in plan.sequences:
        if plan.window is not None and _crosses(span, blocks, plan.window):
            tiles.extend(_window_tiles(span, blocks, plan.window))
        else:
            _causal_tiles(span, blocks, dense, tiles)
    return Tiles(dense, _batch(tiles, plan.window, plan.device))


def _crosses(span: RowSpan, blocks: KeyBlocks, window: int | None) -> bool:
    """Whether some row does not see some key before it."""
    return window is not None and bool(span.index[-1] - blocks.first[0] >= window)


def _causal_tiles(span: RowSpan, blocks: KeyBlocks, dense: list[DenseTile], tiles: list[_Tile]) -> None:
    past = blocks.num_until(int(span.index[0]))
    short = [_dense(span, 0, len(span.index), blocks.take(slice(0, past)), dense)]
    frontier = blocks.take(slice(past, None))
    step = TILE_ROWS if len(frontier) else max(len(span.index), 1)
    for a in range(0, len(span.index), step):
        b = min(a + step, len(span.index))
        before = frontier.num_until(int(span.index[a]))
        until = int(np.searchsorted(frontier.first, span.index[b - 1], side="right"))
        rest = [_dense(span, a, b, frontier.take(slice(0, before)), dense), frontier.take(slice(before, until))]
        index, offset = (np.concatenate(parts) for parts in zip(*(part.keys() for part in short + rest)))
        if len(index):
            tiles.append(_Tile(np.arange(span.start + a, span.start + b), span.index[a:b], index, offset))


def _dense(span: RowSpan, a: int, b: int, blocks: KeyBlocks, dense: list[DenseTile]) -> KeyBlocks:
    """Add dense tiles for the long runs of these blocks; return the blocks of the short ones."""
    for offset, length in blocks.runs():
        if length >= DENSE_KEYS:
            dense.extend(DenseTile(span.start + a, span.start + b, start, min(start + MOST_KEYS, offset + length))
                         for start in range(offset, offset + length, MOST_KEYS))
    return blocks.without_runs(DENSE_KEYS)


def _window_tiles(span: RowSpan, blocks: KeyBlocks, window: int) -> Iterable[_Tile]:
    index, offset = blocks.keys()
    step = min(TILE_ROWS, max(64, window))
    for a in range(0, len(span.index), step):
        b = min(a + step, len(span.index))
        low = int(np.searchsorted(index, span.index[a] - window, side="right"))
        high = int(np.searchsorted(index, span.index[b - 1], side="right"))
        if high > low:
            yield _Tile(np.arange(span.start + a, span.start + b), span.index[a:b], index[low:high], offset[low:high])


def _padded(size: int, unit: int) -> int:
    """The next power of two up to `unit`, then the next multiple of it: few shapes, little padding."""
    return -(-size // unit) * unit if size > unit else 1 << (size - 1).bit_length()


def _batch(tiles: list[_Tile], window: int | None, device: torch.device) -> list[GatheredTiles]:
    """Stack tiles whose padded shapes agree, so that many short sequences cost one call."""
    shapes: dict[tuple[int, int], list[_Tile]] = {}
    for tile in tiles:
        shape = (_padded(len(tile.rows), 64), _padded(len(tile.key_index), 256))
        shapes.setdefault(shape, []).append(tile)
    return [_stack(group, t, s, window, device) for (t, s), group in shapes.items()]


def _stack(group: list[_Tile], t: int, s: int, window: int | None, device: torch.device) -> GatheredTiles:
    n = len(group)
    rows = np.zeros((n, t), dtype=np.int64)
    keys = np.zeros((n, s), dtype=np.int64)
    # A padded row lies before every key and a padded key after every row: neither is ever visible.
    row_index = np.full((n, t), -1, dtype=np.int64)
    key_index = np.full((n, s), np.iinfo(np.int64).max, dtype=np.int64)
    for i, tile in enumerate(group):
        rows[i, : len(tile.rows)] = tile.rows
        row_index[i, : len(tile.rows)] = tile.row_index
        keys[i] = tile.key_offset[0]
        keys[i, : len(tile.key_index)] = tile.key_offset
        key_index[i, : len(tile.key_index)] = tile.key_index
    visible = key_index[:, None, :] <= row_index[:, :, None]
    if window is not None:
        visible &= key_index[:, None, :] > row_index[:, :, None] - window
    valid = np.flatnonzero(row_index >= 0)
    tensors = [torch.from_numpy(x).to(device) for x in (rows, keys, visible, valid)]
    real = rows.flatten()[valid]
    straight = np.array_equal(real, np.arange(real[0], real[0] + len(real)))
    target = slice(int(real[0]), int(real[0]) + len(real)) if straight else torch.from_numpy(real).to(device)
    return GatheredTiles(tensors[0], tensors[1], tensors[2], tensors[3], target)
