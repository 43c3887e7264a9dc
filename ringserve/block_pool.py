"""BlockPool: which slots of which rank are free. No torch: tested in milliseconds.

    request   block:   0    1    2    3    4    5        dealt in stripes to the least loaded rank
              holder:  0    1    0    1    0    1
              slot:    7    3    8    4    9    5        adjacent on each rank when the pool can
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ringserve.block import Copy

STRETCH = 8
"""Adjacent slots that a growing request has to itself when there is room."""


class NoFreeSlotsError(Exception):
    """Internal: the pool cannot give what was asked; the scheduler waits or parks a request."""


@dataclass(slots=True)
class _Run:
    start: int
    stop: int


class SlotRuns:
    """The free slots [0, size) of one layer group on one rank, as sorted runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._runs = [_Run(0, size)] if size else []
        self.free = size

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` slots, adjacent when possible: following `after`, else the first run that is long enough,
        else the longest runs. Raises NoFreeSlotsError and takes nothing when there are too few."""
        if count > self.free:
            raise NoFreeSlotsError(f"{count} slots wanted, {self.free} free")
        taken: list[int] = []
        if after is not None:
            taken += self._take_at(after + 1, count)
        while len(taken) < count:
            missing = count - len(taken)
            run = next((r for r in self._runs if r.stop - r.start >= missing), None)
            run = run or max(self._runs, key=lambda r: r.stop - r.start)
            taken += self._take_at(run.start, missing)
        return taken

    def take_growing(self, after: int | None = None) -> int:
        """One slot for something that will grow: following `after`, else at the start of a stretch of free slots,
        so that requests that grow side by side do not take each other's next slot; else any."""
        if self.free == 0:
            raise NoFreeSlotsError("1 slot wanted, 0 free")
        if after is not None and (taken := self._take_at(after + 1, 1)):
            return taken[0]
        starts = (-(-run.start // STRETCH) * STRETCH for run in self._runs)
        start = next((s for s, run in zip(starts, self._runs) if s + STRETCH <= run.stop), self._runs[0].start)
        return self._take_at(start, 1)[0]

    def _take_at(self, slot: int, most: int) -> list[int]:
        """Up to `most` slots from `slot` on, as far as they are free."""
        i = bisect_left(self._runs, slot + 1, key=lambda r: r.stop)
        if most == 0 or i == len(self._runs) or self._runs[i].start > slot:
            return []
        run = self._runs[i]
        stop = min(run.stop, slot + most)
        rest = [r for r in (_Run(run.start, slot), _Run(stop, run.stop)) if r.start < r.stop]
        self._runs[i:i + 1] = rest
        self.free -= stop - slot
        return list(range(slot, stop))

    def give(self, slots: list[int]) -> None:
        """Return slots, in any order."""
        ordered = sorted(slots)
        i = 0
        while i < len(ordered):
            j = i + 1
            while j < len(ordered) and ordered[j] == ordered[j - 1] + 1:
                j += 1
            self._give_run(ordered[i], ordered[j - 1] + 1)
            i = j

    def _give_run(self, start: int, stop: int) -> None:
        i = bisect_left(self._runs, start, key=lambda r: r.stop)
        assert i == len(self._runs) or self._runs[i].stop == start or self._runs[i].start >= stop, "slot freed twice"
        self.free += stop - start
        j = i
        if j < len(self._runs) and self._runs[j].stop == start:
            start = self._runs[j].start
            j += 1
        if j < len(self._runs) and self._runs[j].start == stop:
            stop = self._runs[j].stop
            j += 1
        assert j == len(self._runs) or self._runs[j].start >= stop, "slot freed twice"
        self._runs[i:j] = [_Run(start, stop)]

    def slots(self) -> set[int]:
        return {slot for run in self._runs for slot in range(run.start, run.stop)}

    def check(self) -> None:
        edges = [edge for run in self._runs for edge in (run.start, run.stop)]
        assert all(a < b for a, b in pairwise(edges)), f"runs overlap or touch: {edges}"
        assert not edges or (edges[0] >= 0 and edges[-1] <= self.size), edges
        assert self.free == sum(run.stop - run.start for run in self._runs)


class BlockPool:
    """Slots of every rank and layer group, and what is set aside on each rank for the output of running requests."""

    def __init__(self, ring_size: int, groups: int, slots_per_rank: int) -> None:
        self.ring_size, self.groups, self.slots_per_rank = ring_size, groups, slots_per_rank
        self._free = [[SlotRuns(slots_per_rank) for _ in range(groups)] for _ in range(ring_size)]
        self._used: set[Copy] = set()
        self.reserved = [0] * ring_size
        """[ranks] blocks that are set aside without being named."""

    @property
    def total(self) -> int:
        return self.ring_size * self.slots_per_rank

    def free_on(self, rank: int) -> int:
        """Slots that hold nothing."""
        return self._free[rank][0].free

    def take(self, rank: int, count: int) -> list[Copy]:
        """Slots for so many blocks on a rank, adjacent when possible. Raises NoFreeSlotsError."""
        copies = [Copy(rank, slots) for slots in zip(*(runs.take(count) for runs in self._free[rank]))]
        self._used.update(copies)
        return copies

    def extend(self, rank: int, after: Copy | None) -> Copy:
        """A slot for one more block on `rank`, following `after` when that is free. Raises NoFreeSlotsError."""
        follow = after.slots if after is not None and after.rank == rank else (None,) * self.groups
        copy = Copy(rank, tuple(runs.take_growing(slot) for runs, slot in zip(self._free[rank], follow)))
        self._used.add(copy)
        return copy

    def give(self, copies: Iterable[Copy]) -> None:
        """Their slots are free again."""
        gone: dict[int, list[Copy]] = {}
        for copy in copies:
            assert copy in self._used, f"{copy} given back twice"
            self._used.remove(copy)
            gone.setdefault(copy.rank, []).append(copy)
        for rank, dead in gone.items():
            for group, runs in enumerate(self._free[rank]):
                runs.give([copy.slots[group] for copy in dead])

    def check(self) -> None:
        """Every slot is free or used by exactly one copy, never both, never neither."""
        for rank in range(self.ring_size):
            for group, runs in enumerate(self._free[rank]):
                runs.check()
                used = [copy.slots[group] for copy in self._used if copy.rank == rank]
                free = runs.slots()
                assert len(used) == len(set(used)), f"rank {rank} group {group}: a slot belongs to two blocks"
                assert not free & set(used), f"rank {rank} group {group}: a slot is free and used"
                assert len(free) + len(used) == self.slots_per_rank, f"rank {rank} group {group}: slots lost"
        assert all(count >= 0 for count in self.reserved), self.reserved


def deal(ranks: Sequence[int], count: int, held: Sequence[int], room: Sequence[int],
         stripe: int = 1) -> list[int] | None:
    """Holders for `count` new blocks of a request: each stripe goes to the one of `ranks` that holds the fewest of its
    blocks, then the one with most room. None when there is no room. `held`, `room`: [ring_size] blocks."""
    held, room = list(held), list(room)
    holders: list[int] = []
    while len(holders) < count:
        fitting = [rank for rank in ranks if room[rank] > 0]
        if not fitting:
            return None
        if len({held[rank] for rank in fitting}) == 1:
            # All equal: from here on it goes round, in one order, until a rank is full.
            rounds = min(min(room[rank] for rank in fitting), count - len(holders)) // stripe // len(fitting)
            order = sorted(fitting, key=lambda r: (-room[r], r))
            holders += [rank for rank in order for _ in range(stripe)] * rounds
            for rank in order:
                held[rank] += rounds * stripe
                room[rank] -= rounds * stripe
            if len(holders) == count:
                break
        rank = min(fitting, key=lambda r: (held[r], -room[r], r))
        size = min(stripe, count - len(holders), room[rank])
        holders += [rank] * size
        held[rank] += size
        room[rank] -= size
    return holders
