"""Slots and blocks: nothing lost, nothing given twice, adjacent where possible, whatever comes and goes."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringserve.block_pool import STRETCH, Block, BlockPool, NoFreeSlotsError, SlotRuns


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
    pool = BlockPool(3, groups=1, slots_per_rank=10)
    assert [b.rank for b in pool.deal([0, 1, 2], 7, [0, 0, 0])] == [0, 1, 2, 0, 1, 2, 0]
    assert [b.rank for b in pool.deal([0, 1, 2], 6, [4, 0, 0], stripe=2)] == [1, 1, 2, 2, 1, 1]
    pool.check()


def test_shares_are_even_whatever_room_the_ranks_have() -> None:
    pool = BlockPool(2, groups=1, slots_per_rank=20)
    pool.deal([1], 12, [0, 0])
    assert [b.rank for b in pool.deal([0, 1], 8, [0, 0])] == [0, 1] * 4


def test_a_rank_without_room_is_passed_over() -> None:
    pool = BlockPool(2, groups=1, slots_per_rank=4)
    pool.deal([0], 3, [0, 0])
    assert [b.rank for b in pool.deal([0, 1], 5, [0, 0])].count(0) == 1
    with pytest.raises(NoFreeSlotsError, match="1 blocks wanted, 0 fit"):
        pool.deal([0, 1], 1, [0, 0])


def test_a_request_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(2, groups=2, slots_per_rank=3)
    with pytest.raises(NoFreeSlotsError):
        pool.deal([0, 1], 7, [0, 0])
    assert pool.unreserved == 6
    pool.check()


def test_a_dealt_prompt_lies_in_adjacent_slots_on_each_rank_and_in_each_group() -> None:
    pool = BlockPool(2, groups=3, slots_per_rank=20)
    blocks = pool.deal([0, 1], 12, [0, 0])
    for rank in range(2):
        for group in range(3):
            slots = [b.slots[group] for b in blocks if b.rank == rank]
            assert slots == list(range(slots[0], slots[0] + 6))
    assert pool.extend(0, blocks[-2]).slots == (6, 6, 6)
    assert pool.extend(1, blocks[-2]).slots == (8, 8, 8)  # blocks[-2] is not on rank 1: a stretch of its own


def test_outputs_that_grow_side_by_side_stay_in_runs() -> None:
    pool = BlockPool(1, groups=1, slots_per_rank=64)
    ours, theirs = (pool.deal([0], 3, [0])[-1:] for _ in range(2))
    for _ in range(16):
        ours.append(pool.extend(0, ours[-1]))
        theirs.append(pool.extend(0, theirs[-1]))
    pool.check()
    for blocks in (ours, theirs):
        breaks = sum(b.slots[0] != a.slots[0] + 1 for a, b in pairwise(blocks))
        assert breaks <= 1 + 16 // STRETCH


def test_a_block_lives_until_its_last_user_lets_go() -> None:
    pool = BlockPool(1, groups=1, slots_per_rank=4)
    blocks = pool.deal([0], 3, [0])
    pool.retain(blocks[:2])
    pool.release(blocks)
    assert pool.free_on(0) == 2
    pool.check()
    pool.release(blocks[:2])
    assert pool.free_on(0) == 4
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks[:1])


def test_reservations_set_blocks_aside() -> None:
    pool = BlockPool(2, groups=1, slots_per_rank=3)
    pool.reserve(4)
    assert pool.unreserved == 2
    with pytest.raises(NoFreeSlotsError, match="3 blocks wanted, 2 neither used nor reserved"):
        pool.reserve(3)
    pool.unreserve(4)
    with pytest.raises(AssertionError):
        pool.unreserve(1)


class PoolMachine(RuleBasedStateMachine):
    """Requests that deal, extend, share and let go of blocks; `check` after every rule."""

    @initialize(ranks=st.integers(1, 4), groups=st.integers(1, 3), slots=st.integers(0, 12))
    def begin(self, ranks: int, groups: int, slots: int) -> None:
        self.pool = BlockPool(ranks, groups, slots)
        self.users: list[list[Block]] = []
        self.reserved = 0

    @rule(count=st.integers(0, 20), stripe=st.integers(1, 4), data=st.data())
    def deal(self, count: int, stripe: int, data: st.DataObject) -> None:
        ring = self.pool.ring_size
        ranks = data.draw(st.lists(st.integers(0, ring - 1), unique=True, min_size=1))
        held = data.draw(st.lists(st.integers(0, 9), min_size=ring, max_size=ring))
        room = sum(self.pool.free_on(rank) for rank in ranks)
        free = [self.pool.free_on(rank) for rank in range(ring)]
        try:
            blocks = self.pool.deal(ranks, count, held, stripe)
        except NoFreeSlotsError:
            assert count > room
            assert free == [self.pool.free_on(rank) for rank in range(ring)]
            return
        assert len(blocks) == count and {b.rank for b in blocks} <= set(ranks)
        self.users.append(blocks)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.users))
        rank = data.draw(st.integers(0, self.pool.ring_size - 1))
        last = blocks[-1] if blocks else None
        if self.pool.free_on(rank) == 0:
            with pytest.raises(NoFreeSlotsError):
                self.pool.extend(rank, last)
            return
        free = [runs.slots() for runs in self.pool._free[rank]]
        block = self.pool.extend(rank, last)
        if last is not None and last.rank == rank:
            for slot, before, there in zip(block.slots, last.slots, free):
                assert slot == before + 1 or before + 1 not in there
        blocks.append(block)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.users))
        shared = blocks[:data.draw(st.integers(0, len(blocks)))]
        self.pool.retain(shared)
        self.users.append(list(shared))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.pool.release(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @rule(count=st.integers(0, 10))
    def reserve(self, count: int) -> None:
        if count > self.pool.unreserved:
            with pytest.raises(NoFreeSlotsError):
                self.pool.reserve(count)
        else:
            self.pool.reserve(count)
            self.reserved += count

    @rule(data=st.data())
    def unreserve(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.reserved))
        self.pool.unreserve(count)
        self.reserved -= count

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            used = {block for blocks in self.users for block in blocks}
            free = sum(self.pool.free_on(rank) for rank in range(self.pool.ring_size))
            assert free == self.pool.total - len(used)
            assert self.pool.unreserved == free - self.reserved


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
