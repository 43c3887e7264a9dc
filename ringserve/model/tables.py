"""Tables: what a rank remembers of each request between plans, and a plan's rows as the rank's inputs."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from ringserve_kernels import KeyBlocks, RingSequence, RowSpan

from ringserve.plan import BlocksDealt, NewRequest, ScheduledRows, SchedulerOutput, TokensKnown, unpack_ids

Ints = NDArray[np.int64]


def _grow(array: Ints, size: int) -> Ints:
    """Room for `size` entries, doubling, so that appending one by one stays cheap."""
    if size <= len(array):
        return array
    grown = np.zeros(max(size, 2 * len(array)), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


@dataclass(slots=True)
class RequestTable:
    """One request: its token ids and, per block, holder, slots and computed tokens."""

    new: NewRequest
    groups: int
    num_tokens: int = 0
    num_blocks: int = 0
    token_ids: Ints = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    holders: Ints = field(default_factory=lambda: np.zeros(16, dtype=np.int64))
    computed: Ints = field(default_factory=lambda: np.zeros(16, dtype=np.int64))
    slots: list[Ints] = field(default_factory=list)
    ranks: set[int] = field(default_factory=set)
    """That hold any of its blocks."""
    _held: dict[int, "HeldKeys"] = field(default_factory=dict, init=False)
    """By rank, kept from step to step: a decode step of a million tokens must not look at every block."""

    def __post_init__(self) -> None:
        self.slots = [np.zeros(16, dtype=np.int64) for _ in range(self.groups)]

    def know(self, tokens: TokensKnown) -> None:
        ids = np.array(unpack_ids(tokens.token_ids), dtype=np.int64)
        stop = tokens.start + len(ids)
        self.token_ids = _grow(self.token_ids, stop)
        self.token_ids[tokens.start:stop] = ids
        self.num_tokens = max(self.num_tokens, stop)

    def deal(self, dealt: BlocksDealt) -> None:
        stop = dealt.start + len(dealt.holders)
        if dealt.start < self.num_blocks or any(dealt.computed):
            self._held.clear()
        self.holders, self.computed = _grow(self.holders, stop), _grow(self.computed, stop)
        self.slots = [_grow(slots, stop) for slots in self.slots]
        self.holders[dealt.start:stop] = dealt.holders
        self.ranks.update(dealt.holders)
        self.computed[dealt.start:stop] = dealt.computed
        for slots, new in zip(self.slots, dealt.slots):
            slots[dealt.start:stop] = new
        self.num_blocks = max(self.num_blocks, stop)

    def mark_computed(self, positions: Ints, block_size: int) -> None:
        blocks = positions // block_size
        touched = np.unique(blocks)
        begun = touched[self.computed[touched] == 0]
        np.maximum.at(self.computed, blocks, positions % block_size + 1)
        for rank in self._held.keys() & set(self.holders[touched].tolist()):
            held = self._held[rank]
            mine = begun[self.holders[begun] == rank]
            if len(mine):
                merged = np.insert(held.blocks, np.searchsorted(held.blocks, mine), mine)
                self._held[rank] = self._held_keys(merged, block_size)
            else:
                length = self.computed[held.blocks]
                self._held[rank] = HeldKeys(held.blocks, [KeyBlocks(k.first, length, k.offset) for k in held.keys])

    def keys(self, rank: int, group: int, block_size: int) -> KeyBlocks:
        """The computed keys that a rank holds."""
        if rank not in self._held:
            n = self.num_blocks
            self._held[rank] = self._held_keys(
                np.flatnonzero((self.holders[:n] == rank) & (self.computed[:n] > 0)), block_size)
        return self._held[rank].keys[group]

    def _held_keys(self, blocks: Ints, block_size: int) -> "HeldKeys":
        first, length = blocks * block_size, self.computed[blocks]
        return HeldKeys(blocks, [KeyBlocks(first, length, slots[blocks] * block_size) for slots in self.slots])


@dataclass(frozen=True, slots=True)
class HeldKeys:
    """The keys of a request that one rank holds. A value: what a step changes, it makes anew."""

    blocks: Ints
    """Those with a computed token, ascending."""
    keys: list[KeyBlocks]
    """[groups]"""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row whose logits are wanted: to choose the next token from, or (not `sample`) to report."""

    row: int
    handle: int
    request: RequestTable
    position: int
    sample: bool


@dataclass(frozen=True, slots=True)
class StepRows:
    """A plan's rows on this rank, and all ranks' for the ring."""

    token_ids: Ints
    positions: Ints
    write_at: list[Ints]
    """[groups] token offset in the pool for each row's key and value."""
    sequences: list[list[RingSequence]]
    """[groups]"""
    samples: list[SampleRow]


class Tables:
    def __init__(self, rank: int, ring_size: int, groups: int, block_size: int) -> None:
        self.rank, self.ring_size, self.groups, self.block_size = rank, ring_size, groups, block_size
        self._requests: dict[int, RequestTable] = {}

    def apply(self, plan: SchedulerOutput) -> StepRows:
        """Take in a plan's deltas and lay out its rows. The rows' keys count as computed from here on."""
        self._take_in(plan)
        return self._rows(plan.rows)

    def absorb(self, plan: SchedulerOutput) -> None:
        """Take in a plan that had nothing to do for this rank, after it was run by others."""
        self._take_in(plan)
        for rows in plan.rows:
            self._requests[rows.handle].mark_computed(_positions(rows), self.block_size)

    def _take_in(self, plan: SchedulerOutput) -> None:
        for handle in plan.released:
            del self._requests[handle]
        for new in plan.new:
            self._requests[new.handle] = RequestTable(new, self.groups)
        for tokens in plan.tokens:
            self._requests[tokens.handle].know(tokens)
        for dealt in plan.blocks:
            self._requests[dealt.handle].deal(dealt)

    def _rows(self, scheduled: list[ScheduledRows]) -> StepRows:
        starts = [0] * self.ring_size
        own: list[tuple[RequestTable, Ints]] = []
        sequences: list[list[RingSequence]] = [[] for _ in range(self.groups)]
        samples: list[SampleRow] = []
        for rows in scheduled:
            request = self._requests[rows.handle]
            positions = _positions(rows)
            request.mark_computed(positions, self.block_size)
            if self.rank not in request.ranks:
                continue  # neither its rows nor its keys are here: nothing travels to or from this rank
            holders = request.holders[positions // self.block_size]
            spans = []
            for rank in range(self.ring_size):
                index = positions[holders == rank]
                spans.append(RowSpan(starts[rank], index))
                starts[rank] += len(index)
            own.append((request, spans[self.rank].index))
            for group in range(self.groups):
                keys = [request.keys(rank, group, self.block_size) for rank in range(self.ring_size)]
                sequences[group].append(RingSequence(spans, keys, rows.modes[group] == "pass-q"))
            mine = spans[self.rank]
            wanted = [(position, False) for position in rows.logits_at] + [(int(positions[-1]), True)] * rows.sample
            samples += [SampleRow(mine.start + int(np.searchsorted(mine.index, position)), rows.handle, request,
                                  position, sample)
                        for position, sample in wanted if position in mine.index]
        return StepRows(
            _concatenate([request.token_ids[index] for request, index in own]),
            _concatenate([index for _, index in own]),
            [_concatenate([self._offsets(request, group, index) for request, index in own])
             for group in range(self.groups)],
            sequences, samples)

    def _offsets(self, request: RequestTable, group: int, positions: Ints) -> Ints:
        return request.slots[group][positions // self.block_size] * self.block_size + positions % self.block_size


def _positions(rows: ScheduledRows) -> Ints:
    return np.concatenate([np.arange(start, stop) for start, stop in rows.spans])


def _concatenate(parts: list[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
