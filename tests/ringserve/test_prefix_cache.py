"""The prefix cache: who finds what, what is evicted first, and its books against a naive model."""

from array import array
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringserve.block import Block
from ringserve.block_pool import BlockPool, NoFreeSlotsError
from ringserve.prefix_cache import PrefixCache, chain, namespace, next_key
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams

SIZE = 2


def make_request(tokens: Sequence[int] = (1,)) -> Request:
    return Request(request_id="r", handle=1, token_ids=array("I", tokens), params=SamplingParams(), seed=0,
                   end_token_ids=(), max_total_tokens=100, arrival=0.0)


def make_cache(ring: int = 1, slots: int = 4, depth_costs: float = 1.0, **options: object) -> PrefixCache:
    """The block at place i costs 1 + i x `depth_costs`."""
    return PrefixCache(BlockPool(ring, 1, slots), SIZE, lambda index: 1.0 + index * depth_costs,
                       **options)  # type: ignore[arg-type]


def bytes_of(number: int) -> bytes:
    return array("I", [number] * SIZE).tobytes()


def key_of(number: int) -> bytes:
    return next_key(b"", bytes_of(number))


def leave(cache: PrefixCache, number: int, rank: int = 0, index: int = 0) -> Block:
    """A complete block that nobody uses."""
    request = make_request()
    [block] = cache.new_blocks(request, list(enumerate([rank], index)))
    cache.publish(block, key_of(number), bytes_of(number))
    block.computed, block.owner = SIZE, None
    cache.release(block, request)
    return block


def again(cache: PrefixCache, block: Block) -> None:
    """Somebody uses it for a moment."""
    request = make_request()
    cache.use(block, request)
    cache.release(block, request)


def cached(cache: PrefixCache, numbers: Sequence[int]) -> list[int]:
    return [n for n in numbers if cache.find(key_of(n), bytes_of(n)) is not None]


# Keys

def test_parts_of_a_namespace_are_length_prefixed() -> None:
    parts = [(), ("",), ("", ""), ("a",), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"),
             ("\x01", ""), ("é",), ("e\u0301",)]
    assert len({namespace(*p) for p in parts}) == len(parts)


def test_tenants_salts_and_identities_never_share() -> None:
    names = ["", "a", "b", "ab", "\0", "a\0"]
    keys = {make_cache(identity=i).first_key(SchedulingParams(tenant=t, cache_salt=s))
            for i, t, s in product(names, repeat=3)}
    assert len(keys) == len(names) ** 3


def test_urgency_is_no_reason_not_to_share() -> None:
    cache = make_cache()
    assert cache.first_key(SchedulingParams(priority=3, deadline_s=1.0)) == cache.first_key(SchedulingParams())


def test_a_key_stands_for_its_tokens_and_all_before_them() -> None:
    first = namespace("x")
    keys = chain(first, array("I", [1, 2, 3, 4, 5, 6, 7]), 2, 3)
    assert len(set(keys)) == 3
    assert chain(first, array("I", [1, 2, 3, 4, 9, 9]), 2, 3)[:2] == keys[:2]
    assert not set(chain(first, array("I", [0, 2, 3, 4, 5, 6]), 2, 3)) & set(keys), "one other token changes all"
    assert not set(chain(namespace("y"), array("I", [1, 2, 3, 4, 5, 6]), 2, 3)) & set(keys)
    assert not set(chain(first, array("I", [3, 4, 5, 6]), 2, 2)) & set(keys), "the same tokens at another place"
    assert chain(first, array("I", [1, 2]), 2, 0) == []
    assert next_key(keys[1], array("I", [5, 6]).tobytes()) == keys[2]


def test_the_tokens_are_compared() -> None:
    cache = make_cache()
    block = leave(cache, 1)
    assert cache.find(key_of(1), bytes_of(1)) is block
    assert cache.find(key_of(1), bytes_of(2)) is None
    assert cache.find(key_of(2), bytes_of(1)) is None


def test_of_two_blocks_with_one_key_the_first_is_found_and_the_second_is_dropped() -> None:
    cache = make_cache()
    first, request = leave(cache, 1), make_request()
    [second] = cache.new_blocks(request, list(enumerate([0])))
    cache.publish(second, key_of(1), bytes_of(2))
    assert second.key is None and cache.find(key_of(1), bytes_of(2)) is None
    second.computed = SIZE
    cache.release(second, request)
    cache.check()
    assert cache.find(key_of(1), bytes_of(1)) is first
    assert (cache.pool.free_on(0), sum(cache._idle)) == (3, 1)


def test_a_cache_that_is_off_finds_and_keeps_nothing() -> None:
    cache = make_cache(enabled=False)
    leave(cache, 1)
    assert cached(cache, [1]) == [] and cache.pool.free_on(0) == 4 and sum(cache._idle) == 0
    cache.check()


# Blocks in use

def test_a_block_being_computed_is_found_and_passes_to_its_oldest_user() -> None:
    cache, requests = make_cache(), [make_request() for _ in range(3)]
    [block] = cache.new_blocks(requests[0], list(enumerate([0])))
    cache.publish(block, key_of(1), bytes_of(1))
    for request in requests[1:]:
        assert cache.find(key_of(1), bytes_of(1)) is block
        cache.use(block, request)
    block.computed = 1
    assert block.owner is requests[0]
    cache.release(block, requests[1])
    assert block.owner is requests[0], "the owner is still there"
    cache.release(block, requests[0])
    assert block.owner is requests[2] and block.computed == 1
    cache.release(block, requests[2])
    assert cached(cache, [1]) == [] and cache.pool.free_on(0) == 4, "a part of a block is worth nothing"
    cache.check()


def test_a_complete_block_has_no_owner_to_pass_on() -> None:
    cache, ours, theirs = make_cache(), make_request(), make_request()
    block = leave(cache, 1)
    cache.use(block, ours)
    cache.use(block, theirs)
    cache.release(block, ours)
    assert block.owner is None and block.users
    cache.check()


def test_blocks_of_one_call_lie_in_adjacent_slots() -> None:
    cache = make_cache(ring=2, slots=8)
    blocks = cache.new_blocks(make_request(), list(enumerate([0, 1, 0, 1, 1], 7)))
    assert [b.index for b in blocks] == [7, 8, 9, 10, 11]
    assert [[b.copies[r].slots[0] for b in blocks if r in b.copies] for r in range(2)] == [[0, 1], [0, 1, 2]]
    cache.check()


# Eviction

def test_old_ones_go_first_among_equals() -> None:
    cache = make_cache(depth_costs=0.0)
    for number in range(4):
        leave(cache, number)
    for number in range(3):
        cache.new_blocks(make_request(), list(enumerate([0])))
        assert cached(cache, range(4)) == list(range(number + 1, 4))
        cache.check()


def test_what_was_used_since_is_young_again() -> None:
    cache = make_cache(depth_costs=0.0)
    blocks = [leave(cache, number) for number in range(4)]
    again(cache, blocks[0])
    again(cache, blocks[2])
    for left in ([0, 2, 3], [0, 2], [2], []):
        cache.new_blocks(make_request(), list(enumerate([0])))
        assert cached(cache, range(4)) == left


def test_a_deep_block_outlives_a_shallow_one_of_the_same_age() -> None:
    cache = make_cache()
    for number, index in enumerate((9, 0, 5, 2)):
        leave(cache, number, index=index)
    gone = []
    for _ in range(4):
        before = cached(cache, range(4))
        cache.new_blocks(make_request(), list(enumerate([0])))
        gone += [n for n in before if n not in cached(cache, range(4))]
    assert gone == [1, 3, 2, 0]


def test_a_deep_block_that_nobody_wants_goes_in_the_end() -> None:
    """GreedyDual: whatever is used ages the rest."""
    cache = make_cache(slots=3)
    leave(cache, 0, index=10)
    shallow = 1
    while cached(cache, [0]):
        leave(cache, shallow)
        shallow += 1
        assert shallow < 40, "a deep block that is never evicted"
    assert shallow > 10, "it outlived some"


def test_a_block_in_use_is_never_evicted() -> None:
    cache, request = make_cache(slots=3), make_request()
    blocks = [leave(cache, number) for number in range(3)]
    for block in blocks[:2]:
        cache.use(block, request)
    cache.new_blocks(make_request(), list(enumerate([0])))
    assert cached(cache, range(3)) == [0, 1]
    for ask in (lambda: cache.new_blocks(make_request(), [(0, 0)]),
                lambda: cache.extend(make_request(), 0, None, 0)):
        with pytest.raises(NoFreeSlotsError, match="1 slots wanted on rank 0, 0 free and 0 idle"):
            ask()
    assert cached(cache, range(3)) == [0, 1]
    cache.check()


def test_too_much_evicts_nothing_on_that_rank() -> None:
    cache = make_cache(slots=4)
    for number in range(3):
        leave(cache, number)
    with pytest.raises(NoFreeSlotsError):
        cache.new_blocks(make_request(), list(enumerate([0] * 5, 0)))
    assert cached(cache, range(3)) == [0, 1, 2] and cache.evicted == 0
    cache.check()


def test_a_hole_in_the_middle_costs_only_itself() -> None:
    cache = make_cache(slots=5, depth_costs=0.0)
    tokens = array("I", range(10))
    keys = chain(namespace("x"), tokens, SIZE, 5)
    pieces = [tokens[i * SIZE:(i + 1) * SIZE].tobytes() for i in range(5)]
    for index in (2, 0, 1, 3, 4):  # the one in the middle is the oldest
        request = make_request()
        [block] = cache.new_blocks(request, list(enumerate([0], index)))
        cache.publish(block, keys[index], pieces[index])
        block.computed, block.owner = SIZE, None
        cache.release(block, request)
    cache.new_blocks(make_request(), list(enumerate([0])))
    assert [cache.find(k, p) is not None for k, p in zip(keys, pieces)] == [True, True, False, True, True]


def test_a_copy_is_evicted_alone_and_the_block_is_still_found() -> None:
    cache, request = make_cache(ring=2, slots=2), make_request()
    block = leave(cache, 1, rank=0)
    cache.use(block, request)
    copy = cache.add_copy(block, 1)
    assert copy.rank == 1 and set(block.copies) == {0, 1}
    cache.release(block, request)
    assert sum(cache._idle) == 2 and cache.room_on(0) == cache.room_on(1) == 2
    cache.new_blocks(make_request(), list(enumerate([0, 0])))
    assert cached(cache, [1]) == [1] and set(block.copies) == {1}
    cache.check()
    cache.new_blocks(make_request(), list(enumerate([1, 1])))
    assert cached(cache, [1]) == [] and cache.evicted == 2
    cache.check()


def test_a_copy_needs_room_and_evicts_for_it() -> None:
    cache, request = make_cache(ring=2, slots=1), make_request()
    block, other = leave(cache, 1, rank=0), leave(cache, 2, rank=1)
    cache.use(block, request)
    cache.add_copy(block, 1)
    assert cached(cache, [1, 2]) == [1] and not other.copies
    with pytest.raises(AssertionError):
        cache.add_copy(block, 1)  # it has one
    cache.check()


def test_reservations_are_no_room() -> None:
    cache = make_cache(slots=4)
    leave(cache, 1)
    cache.pool.reserved[0] = 3
    assert (cache.room_on(0), cache.pool.free_on(0)) == (1, 3)


def test_clear_evicts_all_that_is_idle() -> None:
    cache, request = make_cache(ring=2), make_request()
    leave(cache, 1), leave(cache, 2, rank=1)
    used = leave(cache, 3)
    cache.use(used, request)
    cache.clear()
    assert cached(cache, [1, 2, 3]) == [3] and sum(cache._idle) == 0
    assert (cache.pool.free_on(0), cache.pool.free_on(1)) == (3, 4)
    cache.check()


def test_a_block_that_is_used_again_and_again_costs_no_memory() -> None:
    cache = make_cache(slots=64)
    block = leave(cache, 1)
    for _ in range(5000):
        again(cache, block)
    assert sum(map(len, cache._heaps)) <= 1000
    cache.check()


def test_evicted_blocks_are_forgotten_by_the_heap_too() -> None:
    cache = make_cache(slots=4)
    for number in range(500):
        leave(cache, number)
    assert sum(map(len, cache._heaps)) <= 8


# Against a naive model

class CacheMachine(RuleBasedStateMachine):
    """Requests that find, use, compute, extend, copy and release blocks, as the scheduler does."""

    @initialize(ring=st.integers(1, 3), slots=st.integers(1, 8), depth_costs=st.sampled_from([0.0, 1.0, 2.5]),
                enabled=st.sampled_from([True, True, True, False]))
    def begin(self, ring: int, slots: int, depth_costs: float, enabled: bool) -> None:
        self.cache = make_cache(ring, slots, depth_costs, enabled=enabled)
        self.requests: list[tuple[Request, list[Block]]] = []
        self.idle: dict[int, float] = {}
        """The model: worth of each block that nobody uses, by id."""
        self.known: dict[bytes, Block] = {}
        """All that must be found, by key."""
        self.floor = 0.0
        self.evictions = 0

    def _all(self) -> list[Block]:
        used = {id(b): b for _, blocks in self.requests for b in blocks}
        return [*used.values(), *(b for b in self.known.values() if id(b) not in used)]

    def _room(self, rank: int) -> int:
        used = {id(b): b for _, blocks in self.requests for b in blocks}
        return self.cache.pool.slots_per_rank - sum(rank in b.copies for b in used.values())

    def _expect_evictions(self, wanted: dict[int, int]) -> None:
        """Before slots are taken: note who is idle where. `_saw_evictions` compares."""
        self.before = {id(b): (b, set(b.copies)) for b in self.known.values() if id(b) in self.idle}
        self.free = [self.cache.pool.free_on(r) for r in range(self.cache.pool.ring_size)]
        self.wanted = wanted

    def _saw_evictions(self) -> None:
        floors = []
        for rank in range(self.cache.pool.ring_size):
            there = [b for b, ranks in self.before.values() if rank in ranks]
            gone = [b for b in there if rank not in b.copies]
            assert len(gone) == max(0, self.wanted.get(rank, 0) - self.free[rank]), "too many, or too few"
            self.evictions += len(gone)
            worths = [self.idle[id(b)] for b in gone]
            kept = [self.idle[id(b)] for b in there if rank in b.copies]
            assert not gone or not kept or max(worths) <= min(kept), "a dearer one went first"
            floors += [max(worths)] if gone else []
        if floors:
            assert self.cache._floor in floors
            self.floor = self.cache._floor
        for key, block in list(self.known.items()):
            if not block.copies:
                assert id(block) in self.idle
                del self.known[key], self.idle[id(block)]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), data=st.data())
    def start(self, tokens: list[int], data: st.DataObject) -> None:
        cache, request = self.cache, make_request(tokens)
        count = len(tokens) // SIZE
        keys = chain(namespace("x"), request.token_ids, SIZE, count)
        pieces = [request.token_ids[i * SIZE:(i + 1) * SIZE].tobytes() for i in range(count)]
        found = {i: block for i in range(count) if (block := cache.find(keys[i], pieces[i])) is not None}
        assert found == ({i: self.known[keys[i]] for i in range(count) if keys[i] in self.known}
                         if cache.enabled else {})
        for block in found.values():
            cache.use(block, request)
            self.idle.pop(id(block), None)
        self.requests.append((request, list(found.values())))
        total = -(-len(tokens) // SIZE)
        holders = [data.draw(st.integers(0, cache.pool.ring_size - 1)) for _ in range(total - len(found))]
        wanted = {rank: holders.count(rank) for rank in holders}
        self._expect_evictions(wanted)
        if any(count > self._room(rank) for rank, count in wanted.items()):
            with pytest.raises(NoFreeSlotsError):
                cache.new_blocks(request, list(enumerate(holders)))
            self._saw_evictions_of_a_refusal()
            self._release(len(self.requests) - 1)
            return
        made = iter(cache.new_blocks(request, list(enumerate(holders))))
        self._saw_evictions()
        blocks = self.requests[-1][1]
        blocks[:] = [found.get(i) or next(made) for i in range(total)]
        for i, block in enumerate(blocks):
            block.index = i
            if i not in found and i < count:
                cache.publish(block, keys[i], pieces[i])
                if cache.enabled:
                    self.known.setdefault(keys[i], block)

    def _saw_evictions_of_a_refusal(self) -> None:
        """A rank before the one without room may have made room: nothing is taken, though."""
        for key, block in list(self.known.items()):
            if not block.copies:
                del self.known[key], self.idle[id(block)]
        self.floor = self.cache._floor
        self.evictions = self.cache.evicted

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), most=st.integers(1, 8))
    def compute(self, data: st.DataObject, most: int) -> None:
        request, blocks = data.draw(st.sampled_from(self.requests))
        for block in blocks:
            if block.computed == SIZE:
                continue
            if block.owner is not request:
                break
            while most and block.computed < SIZE:
                block.computed += 1
                most -= 1
            if block.computed == SIZE:
                block.owner = None

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        request, blocks = data.draw(st.sampled_from(self.requests))
        rank = data.draw(st.integers(0, self.cache.pool.ring_size - 1))
        last = next((b.copies[rank] for b in reversed(blocks) if rank in b.copies), None)
        self._expect_evictions({rank: 1})
        if not self._room(rank):
            with pytest.raises(NoFreeSlotsError):
                self.cache.extend(request, rank, last, len(blocks))
            return
        blocks.append(self.cache.extend(request, rank, last, len(blocks)))
        self._saw_evictions()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def add_copy(self, data: st.DataObject) -> None:
        _, blocks = data.draw(st.sampled_from(self.requests))
        ranks = range(self.cache.pool.ring_size)
        able = [(b, r) for b in blocks if b.computed == SIZE for r in ranks if r not in b.copies]
        if not able:
            return
        block, rank = data.draw(st.sampled_from(able))
        self._expect_evictions({rank: 1})
        if not self._room(rank):
            with pytest.raises(NoFreeSlotsError):
                self.cache.add_copy(block, rank)
            return
        self.cache.add_copy(block, rank)
        self._saw_evictions()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self._release(data.draw(st.integers(0, len(self.requests) - 1)))

    def _release(self, number: int) -> None:
        request, blocks = self.requests.pop(number)
        for block in reversed(blocks):
            self.cache.release(block, request)
            if any(block in others for _, others in self.requests):
                assert block.copies, "in use"
                assert block.computed == SIZE or block.owner is not None
                assert block.owner is not request
            elif block.key is not None and self.known.get(block.key) is block and block.computed == SIZE:
                self.idle[id(block)] = self.floor + self.cache._cost(block.index)
                assert block.worth == self.idle[id(block)] and block.copies
            else:
                assert not block.copies
                if block.key is not None:
                    del self.known[block.key]

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        for key, block in list(self.known.items()):
            if id(block) in self.idle:
                assert not block.copies
                del self.known[key]
        self.idle.clear()
        self.floor, self.evictions = self.cache._floor, self.cache.evicted

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        for rank in range(self.cache.pool.ring_size):
            assert self.cache.room_on(rank) == self._room(rank)
        assert self.cache._blocks == self.known
        assert self.cache.evicted == self.evictions
        copies = [c for b in self._all() for c in b.copies.values()]
        assert len(copies) == len(set(copies)) and set(copies) == self.cache.pool._used


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.long
class TestCacheAtLength(CacheMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=2000, stateful_step_count=80, deadline=None,
                        suppress_health_check=[HealthCheck.too_slow])
