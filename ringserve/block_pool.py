"""BlockPool: which slots of which rank are free, and who holds each block. No torch: tested in milliseconds.

    request   block:   0    1    2    3    4    5        dealt in stripes to the least loaded rank
              holder:  0    1    0    1    0    1
              slot:    7    3    8    4    9    5        adjacent on each rank when the pool can
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True, slots=True)
class Block:
    """One copy of a block: its holder and, per layer group, the slot there."""

    rank: int
    slots: tuple[int, ...]


class BlockPool:
    """Slots of every rank and layer group, with reference counts and reservations.

    A block is referenced by the requests that use it; it is free again when the last lets go. A reservation
    sets a number of blocks aside for a running request's output without naming them.
    """

    def __init__(self, ring_size: int, groups: int, slots_per_rank: int) -> None:
        self.ring_size, self.groups, self.slots_per_rank = ring_size, groups, slots_per_rank
        self._free = [[SlotRuns(slots_per_rank) for _ in range(groups)] for _ in range(ring_size)]
        self._references: dict[Block, int] = {}
        self.reserved = 0

    @property
    def total(self) -> int:
        return self.ring_size * self.slots_per_rank

    def free_on(self, rank: int) -> int:
        return min(runs.free for runs in self._free[rank])

    @property
    def unreserved(self) -> int:
        """Blocks that are neither in use nor set aside."""
        return sum(self.free_on(rank) for rank in range(self.ring_size)) - self.reserved

    def reserve(self, count: int) -> None:
        if count > self.unreserved:
            raise NoFreeSlotsError(f"{count} blocks wanted, {self.unreserved} neither used nor reserved")
        self.reserved += count

    def unreserve(self, count: int) -> None:
        assert 0 <= count <= self.reserved, (count, self.reserved)
        self.reserved -= count

    def deal(self, ranks: list[int], count: int, held: list[int], stripe: int = 1) -> list[Block]:
        """New blocks for a request, referenced once: each stripe goes to the one of `ranks` that holds the
        fewest of the request's blocks (`held`, [ring_size], not changed), then the one with most room.

        Raises NoFreeSlotsError and takes nothing when the ranks cannot hold them."""
        room = [self.free_on(rank) for rank in range(self.ring_size)]
        held = list(held)
        holders: list[int] = []
        while len(holders) < count:
            fitting = [rank for rank in ranks if room[rank] > 0]
            if not fitting:
                raise NoFreeSlotsError(f"{count} blocks wanted, {len(holders)} fit on ranks {ranks}")
            rank = min(fitting, key=lambda r: (held[r], -room[r], r))
            size = min(stripe, count - len(holders), room[rank])
            holders += [rank] * size
            held[rank] += size
            room[rank] -= size
        taken = {rank: [runs.take(holders.count(rank)) for runs in self._free[rank]] for rank in set(holders)}
        return self._name(holders, taken)

    def extend(self, rank: int, after: Block | None) -> Block:
        """One more block on `rank`, in the slots following `after` when they are free."""
        if self.free_on(rank) == 0:
            raise NoFreeSlotsError(f"rank {rank} has no free slot")
        follow = after.slots if after is not None and after.rank == rank else (None,) * self.groups
        taken = [[runs.take_growing(slot)] for runs, slot in zip(self._free[rank], follow)]
        return self._name([rank], {rank: taken})[0]

    def _name(self, holders: list[int], taken: dict[int, list[list[int]]]) -> list[Block]:
        streams = {rank: zip(*slots) for rank, slots in taken.items()}
        blocks = [Block(rank, tuple(next(streams[rank]))) for rank in holders]
        self._references.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: list[Block]) -> None:
        """Drop one reference each; blocks without any are free again."""
        gone: dict[int, list[Block]] = {}
        for block in blocks:
            assert block in self._references, f"{block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                gone.setdefault(block.rank, []).append(block)
        for rank, dead in gone.items():
            for group, runs in enumerate(self._free[rank]):
                runs.give([block.slots[group] for block in dead])

    def check(self) -> None:
        """Every slot is free or used by exactly one block, never both, never neither."""
        for rank in range(self.ring_size):
            for group, runs in enumerate(self._free[rank]):
                runs.check()
                used = [b.slots[group] for b in self._references if b.rank == rank]
                free = runs.slots()
                assert len(used) == len(set(used)), f"rank {rank} group {group}: a slot belongs to two blocks"
                assert not free & set(used), f"rank {rank} group {group}: a slot is free and used"
                assert len(free) + len(used) == self.slots_per_rank, f"rank {rank} group {group}: slots lost"
        assert all(count > 0 for count in self._references.values())
        assert self.reserved >= 0
