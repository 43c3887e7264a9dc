"""Slots and blocks: nothing lost, nothing given twice, adjacent where possible, whatever comes and goes."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringserve.block import Copy
from ringserve.block_pool import STRETCH, BlockPool, NoFreeSlotsError, SlotRuns, deal


def test_slots_follow_the_one_named() -> None:
    runs = SlotRuns(10)
    assert runs.take(3) == [0, 1, 2]
    assert runs.take(2, after=5) == [6, 7]
    assert runs.take(3, after=7) == [8, 9, 3]
    runs.check()


def test_the_first_run_that_is_long_enough_is_taken() -> None:
    runs = SlotRuns(12)
    runs.take(12)
    runs.give([0, 1, 4, 5, 6, 9, 10, 11])
    assert runs.take(3) == [4, 5, 6]
    assert runs.take(2) == [0, 1]


def test_without_a_long_run_the_longest_are_taken() -> None:
    runs = SlotRuns(12)
    runs.take(12)
    runs.give([0, 3, 4, 5, 8, 9])
    assert runs.take(5) == [3, 4, 5, 8, 9]
    runs.check()


def test_taking_none_changes_nothing() -> None:
    runs = SlotRuns(4)
    assert runs.take(0) == runs.take(0, after=1) == []
    runs.check()


def test_too_many_slots_take_nothing() -> None:
    runs = SlotRuns(4)
    runs.take(2)
    with pytest.raises(NoFreeSlotsError, match="3 slots wanted, 2 free"):
        runs.take(3)
    assert runs.free == 2 and runs.slots() == {2, 3}


@pytest.mark.parametrize("again", [[3], [1, 2], [5, 6], [0, 1, 2, 3, 4, 5, 6, 7], [9, 3], [4, 4]])
def test_a_slot_freed_twice_is_found(again: list[int]) -> None:
    runs = SlotRuns(10)
    runs.take(10)
    runs.give([2, 3, 6])
    with pytest.raises(AssertionError, match="freed twice"):
        runs.give(again)


def test_an_empty_rank_has_nothing_to_give() -> None:
    runs = SlotRuns(0)
    runs.check()
    with pytest.raises(NoFreeSlotsError):
        runs.take(1)


class SlotMachine(RuleBasedStateMachine):
    """Takes and gives slots against a plain set."""

    @initialize(size=st.integers(0, 40))
    def begin(self, size: int) -> None:
        self.runs = SlotRuns(size)
        self.free = set(range(size))
        self.taken: list[int] = []

    @rule(count=st.integers(0, 12), after=st.none() | st.integers(0, 40))
    def take(self, count: int, after: int | None) -> None:
        if count > len(self.free):
            with pytest.raises(NoFreeSlotsError):
                self.runs.take(count, after)
            return
        longest = max((len(list(run)) for run in self._stretches()), default=0)
        slots = self.runs.take(count, after)
        assert len(set(slots)) == count and set(slots) <= self.free
        following = 0
        while after is not None and following < count and after + 1 + following in self.free:
            following += 1
        assert slots[:following] == [after + 1 + i for i in range(following)]  # type: ignore[operator]
        if following == 0 and count <= longest:
            assert slots == list(range(slots[0], slots[0] + count)) if slots else count == 0
        self.free -= set(slots)
        self.taken += slots

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(self.taken), unique=True, min_size=1))
        self.runs.give(slots)
        self.free |= set(slots)
        self.taken = [slot for slot in self.taken if slot not in self.free]

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def give_twice(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.free)))
        with pytest.raises(AssertionError):
            self.runs.give([slot])
        self._forget_the_failure()

    def _forget_the_failure(self) -> None:
        """An assertion leaves the counters as they were caught: rebuild."""
        self.runs = SlotRuns(self.runs.size)
        self.runs.take(self.runs.size)
        self.runs.give(list(self.free))

    def _stretches(self) -> list[range]:
        stretches: list[range] = []
        for slot in sorted(self.free):
            if stretches and stretches[-1].stop == slot:
                stretches[-1] = range(stretches[-1].start, slot + 1)
            else:
                stretches.append(range(slot, slot + 1))
        return stretches

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "runs"):
            self.runs.check()
            assert self.runs.slots() == self.free and self.runs.free == len(self.free)


def test_blocks_are_dealt_in_stripes_to_the_least_loaded() -> None:
    assert deal([0, 1, 2], 7, [0, 0, 0], [10, 10, 10]) == [0, 1, 2, 0, 1, 2, 0]
    assert deal([0, 1, 2], 6, [4, 0, 0], [10, 10, 10], stripe=2) == [1, 1, 2, 2, 1, 1]


def test_shares_are_even_whatever_room_the_ranks_have() -> None:
    assert deal([0, 1], 8, [0, 0], [20, 8]) == [0, 1] * 4


def test_among_equals_the_rank_with_most_room_is_dealt_to() -> None:
    assert deal([0, 1, 2], 3, [0, 0, 0], [4, 9, 6]) == [1, 2, 0]


def test_a_rank_without_room_is_passed_over() -> None:
    assert deal([0, 1], 5, [0, 0], [1, 4]) == [1, 0, 1, 1, 1]
    assert deal([0, 1], 5, [0, 0], [0, 4]) is None
    assert deal([0, 1], 3, [0, 0], [-2, 4]) == [1, 1, 1]


def test_no_blocks_are_dealt_to_nobody() -> None:
    assert deal([0], 0, [0], [0]) == []
    assert deal([], 0, [0], [0]) == []
    assert deal([], 1, [0], [5]) is None


@given(st.data(), st.integers(1, 5), st.integers(0, 30), st.integers(1, 4))
def test_what_is_dealt_has_room_and_is_even(data: st.DataObject, ring: int, count: int, stripe: int) -> None:
    ranks = data.draw(st.lists(st.integers(0, ring - 1), unique=True, min_size=1))
    held = data.draw(st.lists(st.integers(0, 9), min_size=ring, max_size=ring))
    room = data.draw(st.lists(st.integers(-3, 20), min_size=ring, max_size=ring))
    before = (list(held), list(room))
    holders = deal(ranks, count, held, room, stripe)
    assert (held, room) == before, "the caller's lists are not touched"
    if holders is None:
        assert sum(max(room[rank], 0) for rank in ranks) < count
        return
    assert len(holders) == count and set(holders) <= set(ranks)
    after = [held[rank] + holders.count(rank) for rank in range(ring)]
    assert all(holders.count(rank) <= max(room[rank], 0) for rank in ranks)
    for rank in set(holders):
        # Nobody that still had room was left further behind than a stripe.
        assert all(after[rank] - stripe <= after[other] for other in ranks if holders.count(other) < room[other])


def test_taken_blocks_lie_in_adjacent_slots_on_each_rank_and_in_each_group() -> None:
    pool = BlockPool(2, groups=3, slots_per_rank=20)
    copies = {rank: pool.take(rank, 6) for rank in range(2)}
    for rank in range(2):
        assert copies[rank] == [Copy(rank, (slot,) * 3) for slot in range(6)]
    assert pool.extend(0, copies[0][-1]).slots == (6, 6, 6)
    assert pool.extend(1, copies[0][-1]).slots == (8, 8, 8)  # that is not on rank 1: a stretch of its own
    pool.check()


def test_too_many_blocks_take_nothing() -> None:
    pool = BlockPool(2, groups=2, slots_per_rank=3)
    with pytest.raises(NoFreeSlotsError):
        pool.take(0, 4)
    pool.take(0, 3)
    with pytest.raises(NoFreeSlotsError):
        pool.extend(0, None)
    assert (pool.total, pool.free_on(0), pool.free_on(1)) == (6, 0, 3)
    pool.check()


def test_outputs_that_grow_side_by_side_stay_in_runs() -> None:
    pool = BlockPool(1, groups=1, slots_per_rank=64)
    ours, theirs = (pool.take(0, 3)[-1:] for _ in range(2))
    for _ in range(16):
        ours.append(pool.extend(0, ours[-1]))
        theirs.append(pool.extend(0, theirs[-1]))
    pool.check()
    for copies in (ours, theirs):
        breaks = sum(b.slots[0] != a.slots[0] + 1 for a, b in pairwise(copies))
        assert breaks <= 1 + 16 // STRETCH


def test_a_copy_given_back_is_free_once() -> None:
    pool = BlockPool(2, groups=2, slots_per_rank=4)
    here, there = pool.take(0, 3), pool.take(1, 2)
    pool.give([here[1], *there])
    assert (pool.free_on(0), pool.free_on(1)) == (2, 4)
    pool.check()
    for gone in (here[1], there[0], Copy(0, (3, 3))):
        with pytest.raises(AssertionError, match="given back twice"):
            pool.give([gone])


def test_check_finds_a_reservation_below_zero() -> None:
    pool = BlockPool(2, groups=1, slots_per_rank=3)
    pool.reserved[1] -= 1
    with pytest.raises(AssertionError):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Requests that take, extend and let go of copies; `check` after every rule."""

    @initialize(ranks=st.integers(1, 4), groups=st.integers(1, 3), slots=st.integers(0, 12))
    def begin(self, ranks: int, groups: int, slots: int) -> None:
        self.pool = BlockPool(ranks, groups, slots)
        self.users: list[list[Copy]] = []

    @rule(count=st.integers(0, 14), data=st.data())
    def take(self, count: int, data: st.DataObject) -> None:
        rank = data.draw(st.integers(0, self.pool.ring_size - 1))
        if count > self.pool.free_on(rank):
            with pytest.raises(NoFreeSlotsError):
                self.pool.take(rank, count)
            return
        copies = self.pool.take(rank, count)
        assert len(copies) == count and all(copy.rank == rank for copy in copies)
        self.users.append(copies)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        copies = data.draw(st.sampled_from(self.users))
        rank = data.draw(st.integers(0, self.pool.ring_size - 1))
        last = copies[-1] if copies else None
        if self.pool.free_on(rank) == 0:
            with pytest.raises(NoFreeSlotsError):
                self.pool.extend(rank, last)
            return
        free = [runs.slots() for runs in self.pool._free[rank]]
        copy = self.pool.extend(rank, last)
        if last is not None and last.rank == rank:
            for slot, before, there in zip(copy.slots, last.slots, free):
                assert slot == before + 1 or before + 1 not in there
        copies.append(copy)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """All of a request's copies or some, of several ranks in one call."""
        copies = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        gone = data.draw(st.lists(st.sampled_from(copies), unique=True)) if copies else []
        self.pool.give(gone)
        self.users.append([copy for copy in copies if copy not in gone])

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            used = {copy for copies in self.users for copy in copies}
            assert used == self.pool._used
            for rank in range(self.pool.ring_size):
                assert self.pool.free_on(rank) == self.pool.slots_per_rank - sum(c.rank == rank for c in used)


SMALL = settings(max_examples=25, stateful_step_count=25, deadline=None)
LARGE = settings(max_examples=1500, stateful_step_count=80, deadline=None,
                 suppress_health_check=[HealthCheck.too_slow])

TestSlots = SlotMachine.TestCase
TestSlots.settings = SMALL
TestBlocks = PoolMachine.TestCase
TestBlocks.settings = SMALL


@pytest.mark.long
class TestSlotsAtLength(SlotMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = LARGE


@pytest.mark.long
class TestBlocksAtLength(PoolMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = LARGE
