"""PagedTable: which rows attend to which blocks of keys, cut into work items. Built once per step, used by every
layer of a group (equal window, equal heads, equal head dims).

All decisions are made here, on the host, from token indices alone; the kernels only walk ranges of keys:

    blocks of one sequence, by token index                       tile of rows r0 .. r1
    [ behind the window ][ left edge ][ dense ][ right edge ][ after r1 ]
         not read          masked     no mask     masked       not read

Positions count the keys of the batch's blocks as if every block were full: position p lies in block p // block_size
of the flat table, at p % block_size. A block that is not full, and every edge, is read under a mask.

A sequence with few rows is *split*: its keys are cut into pieces, each a work item of its own that writes a partial
(o, lse) to scratch, and a reduction merges them. How many pieces depends on the sequence alone, so a row's result
does not depend on which other sequences are in the batch, to the last bit.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringserve_kernels.attention_plan import Ints, KeyBlocks, RowSpan
from ringserve_kernels.errors import ShapeError
from ringserve_kernels.spec import AttentionSpec

BLOCK_SIZES = (16, 32, 64, 128, 256)
TILE_ROWS = (16, 64, 128)
"""Packed rows of a tile: one query head of one row each. 64 is what one warpgroup multiplies on sm_90."""
WIDE_DIM = 128
"""Head dims above this leave no registers for tiles of 128 rows."""
SPLIT_ROWS = 512
"""Sequences of at most as many packed rows are split."""
PIECE_KEYS = 512
"""Least keys of a piece: 256 KiB of K and V in bf16 at a head dim of 128, about 10 us of one SM's memory traffic."""
MOST_PIECE_ROWS = 8192
"""Packed rows times pieces of a sequence: bounds the scratch at 4 MiB per kv head for value dim 128."""
ITEM_FIELDS = 7
"""(row, rows, target, start, dense_start, dense_stop, stop): rows of q, the first row of the output (of the scratch,
when split), and positions."""
REDUCTION_FIELDS = 4
"""(row, first scratch row, distance to the next piece's, pieces)."""

_Narrow = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TileItems:
    """The work items of one launch."""

    tile_rows: int
    """Packed rows of the tile, one of TILE_ROWS."""
    split: bool
    """Items write partials to scratch; else they are merged into the accumulators at once."""
    items_NF: Tensor
    """int32 [items, ITEM_FIELDS], longest first: the last ones to run should be short."""


@dataclass(frozen=True, slots=True)
class PagedTable:
    """A ragged batch over one storage, on the device. Made by `page_table`."""

    rows: int
    """Rows of q."""
    block_size: int
    """Keys of a full block."""
    group: int
    """Query heads per kv head."""
    window: int | None
    key_dim: int
    value_dim: int
    storage_tokens: int
    """The storage must have at least this many."""
    row_index_T: Tensor
    """int32: token index of each row."""
    first_B: Tensor
    """int32: token index of each block's first key."""
    length_B: Tensor
    """int32: keys in each block."""
    offset_B: Tensor
    """int32: where each block begins on the storage's token axis."""
    tiles: tuple[TileItems, ...]
    reduction_RF: Tensor
    """int32 [split rows, REDUCTION_FIELDS]."""
    scratch_rows: int
    """Partials that all split sequences write."""


@dataclass(frozen=True, slots=True)
class _Items:
    tile_rows: int
    split: bool
    items: Ints


def page_table(rows: int, sequences: Iterable[tuple[RowSpan, KeyBlocks]], spec: AttentionSpec, block_size: int,
               device: torch.device) -> PagedTable:
    """Cut the attention of a ragged batch into work items.

    `rows` is the number of rows of q. A block has at most `block_size` keys; its keys are adjacent in the storage.
    A row belongs to one sequence. Blocks that no row can see are not uploaded. One copy to the device.

    Raises ShapeError for a block size, a block, rows or a number of query heads per kv head that the kernels do
    not take.
    """
    group = spec.num_heads // spec.num_kv_heads
    if block_size not in BLOCK_SIZES:
        raise ShapeError("block_size", block_size, BLOCK_SIZES)
    tile_sizes = TILE_ROWS if max(spec.key_dim, spec.value_dim) <= WIDE_DIM else TILE_ROWS[:-1]
    if group > tile_sizes[-1]:
        raise ShapeError("spec", f"of {group} query heads per kv head", f"at most {tile_sizes[-1]} for its dims")
    row_index = np.full(rows, -1, dtype=np.int64)
    blocks: list[KeyBlocks] = []
    items: list[_Items] = []
    reductions: list[Ints] = []
    num_blocks = scratch_rows = storage_tokens = 0
    for span, all_blocks in sequences:
        _check_sequence(span, all_blocks, rows, block_size)
        mine = row_index[span.start : span.start + len(span.index)]
        if (mine >= 0).any():
            raise ShapeError("sequences", f"with row {span.start + int(np.argmax(mine >= 0))} twice", "each row once")
        mine[:] = span.index
        reach = all_blocks.in_reach(span.index, spec.window)
        if len(reach) == 0:
            continue
        items_of, reduction = _cut(span, reach, spec.window, group, tile_sizes, block_size, scratch_rows)
        items_of.items[:, 3:] += num_blocks * block_size
        items.append(items_of)
        reductions.append(reduction)
        scratch_rows += int(reduction[:, 3].sum())
        storage_tokens = max(storage_tokens, int((reach.offset + reach.length).max()))
        num_blocks += len(reach)
        blocks.append(reach)
    launches = {(i.tile_rows, i.split): [j.items for j in items if (j.tile_rows, j.split) == (i.tile_rows, i.split)]
                for i in items}
    largest = max(storage_tokens, num_blocks * block_size, scratch_rows, int(row_index.max(initial=0)))
    if largest >= 2**31:
        raise ShapeError("sequences", f"of {largest} keys, storage offsets or token indices", "fewer than 2**31")
    parts = _upload(device, [
        row_index, *(np.concatenate([getattr(b, name) for b in blocks] or [np.zeros(0, dtype=np.int64)])
                     for name in ("first", "length", "offset")),
        np.concatenate(reductions or [np.zeros((0, REDUCTION_FIELDS), dtype=np.int64)]),
        *(_longest_first(np.concatenate(parts)) for parts in launches.values())])
    tiles = tuple(TileItems(tile_rows, split, part) for (tile_rows, split), part in zip(launches, parts[5:]))
    row_index_T, first_B, length_B, offset_B, reduction_RF = parts[:5]
    return PagedTable(rows, block_size, group, spec.window, spec.key_dim, spec.value_dim, storage_tokens, row_index_T,
                      first_B, length_B, offset_B, tiles, reduction_RF, scratch_rows)


def _check_sequence(span: RowSpan, blocks: KeyBlocks, rows: int, block_size: int) -> None:
    if span.start < 0 or span.start + len(span.index) > rows:
        raise ShapeError("sequences", f"with rows {span.start} to {span.start + len(span.index)}", f"0 to {rows}")
    if len(blocks) and not 0 < int(blocks.length.min()) <= int(blocks.length.max()) <= block_size:
        raise ShapeError("sequences", f"with blocks of {int(blocks.length.min())} to {int(blocks.length.max())} keys",
                         f"1 to {block_size}")


def _cut(span: RowSpan, blocks: KeyBlocks, window: int | None, group: int, tile_sizes: tuple[int, ...],
         block_size: int, scratch_rows: int) -> tuple[_Items, Ints]:
    """(work items with positions relative to the first of these blocks, how its partials are reduced)."""
    packed = len(span.index) * group
    split = packed <= SPLIT_ROWS
    wanted = max(group, min(packed, TILE_ROWS[1] if split else tile_sizes[-1]))
    tile_rows = next(size for size in tile_sizes if size >= wanted)
    edges = _tile_edges(span, blocks, window, tile_rows // group, block_size)
    if not split:
        edges[:, 2] = edges[:, 0] + span.start
        edges[:, 0] += span.start
        edges[:, 3:] *= block_size
        return _Items(tile_rows, False, edges), np.zeros((0, REDUCTION_FIELDS), dtype=np.int64)
    piece = _piece_blocks(packed, len(blocks), block_size)
    pieces = []
    for number, low in enumerate(range(0, len(blocks), piece)):
        items = edges.copy()
        items[:, 2] = scratch_rows + number * len(span.index) + edges[:, 0]
        items[:, 0] += span.start
        items[:, 3:] = np.clip(edges[:, 3:], low, min(low + piece, len(blocks))) * block_size
        pieces.append(items)
    rows = np.arange(len(span.index))
    reduction = np.stack([rows + span.start, rows + scratch_rows, np.full_like(rows, len(rows)),
                          np.full_like(rows, len(pieces))], axis=1)
    return _Items(tile_rows, True, np.concatenate(pieces)), reduction


def _piece_blocks(packed: int, blocks: int, block_size: int) -> int:
    """Blocks of a piece: at least PIECE_KEYS keys, more where the partials would otherwise be too many."""
    most_pieces = MOST_PIECE_ROWS // max(packed, TILE_ROWS[1])
    return max(PIECE_KEYS // block_size, -(-blocks // most_pieces))


def _tile_edges(span: RowSpan, blocks: KeyBlocks, window: int | None, step: int, block_size: int) -> Ints:
    """[tiles, ITEM_FIELDS] with rows relative to the span, target 0, and block numbers for positions."""
    a = np.arange(0, len(span.index), step)
    b = np.minimum(a + step, len(span.index))
    low, high = span.index[a], span.index[b - 1]
    last = blocks.first + blocks.length - 1
    stop = np.searchsorted(blocks.first, high, side="right")
    start = dense_start = np.zeros_like(a)
    if window is not None:
        start = np.minimum(np.searchsorted(last, low - window, side="right"), stop)
        dense_start = np.searchsorted(blocks.first, high - window, side="right")
    # Without a mask nothing tells a key from a free slot, so the dense part ends at the first block that is not
    # full; in practice that is the sequence's last.
    short = np.flatnonzero(blocks.length < block_size)
    whole = np.append(short, len(blocks))[np.searchsorted(short, dense_start)]
    dense_stop = np.minimum(np.searchsorted(last, low, side="right"), whole)
    none = dense_stop <= dense_start
    dense_start, dense_stop = np.where(none, start, dense_start), np.where(none, start, dense_stop)
    return np.stack([a, b - a, np.zeros_like(a), start, dense_start, dense_stop, stop], axis=1)


def _longest_first(items: Ints) -> Ints:
    return items[np.argsort(items[:, 3] - items[:, 6], kind="stable")]


def _upload(device: torch.device, parts: list[Ints]) -> list[Tensor]:
    """All parts in one copy, as int32. Each begins at a multiple of 16 bytes: Triton compiles another kernel for
    pointers that do not."""
    sizes = [-(-part.size // 4) * 4 for part in parts]
    flat: _Narrow = np.zeros(sum(sizes), dtype=np.int32)
    starts = np.cumsum([0, *sizes])
    for part, at in zip(parts, starts):
        flat[at : at + part.size] = part.ravel()
    uploaded = torch.from_numpy(flat).to(device)
    return [uploaded[at : at + part.size].view(part.shape) for part, at in zip(parts, starts)]
