"""Where requests go: how many ranks, which, and that what is promised is there."""

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringserve.block import Block
from ringserve.block_pool import BlockPool
from ringserve.cost_model import EXCHANGE, CostModel, Machine
from ringserve.placement import Placement, Placer
from ringserve.plan import LayerGroup
from ringserve.prefix_cache import PrefixCache, chain
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams
from tests.ringserve.fake_ranks import Driven

SIZE = 16
GROUP = LayerGroup(num_kv_heads=2, key_dim=64, value_dim=64, window=None, layers=tuple(range(4)), num_heads=8,
                   key_bytes=2 * 128 * 4)
CPU = Machine(flops=5e10, link_bytes_per_s=5e9, element_bytes=4, overlaps=False)


class Ring:
    def __init__(self, ring: int = 4, slots: int = 10_000, width: int | None = None) -> None:
        self.pool = BlockPool(ring, 1, slots)
        self.cost = CostModel([GROUP], 2e7, ring, CPU)
        self.cache = PrefixCache(self.pool, SIZE, lambda index: 1.0 + index)
        self.placer = Placer(self.cache, self.cost, width)

    def request(self, tokens: int, output: int = 16, seed: int = 0, ranks: tuple[int, ...] = ()) -> Request:
        request = Request(request_id="r", handle=1, token_ids=array("I", [seed + i for i in range(tokens)]),
                          params=SamplingParams(), seed=0, end_token_ids=(), max_total_tokens=tokens + output,
                          arrival=0.0, wanted_ranks=ranks)
        ring = self.pool.ring_size
        request.held, request.keys_on, request.reserved = [0] * ring, [0] * ring, [0] * ring
        request.keys = chain(b"x", request.token_ids, SIZE, tokens // SIZE)
        return request

    def leave(self, request: Request, blocks: Sequence[int], rank: int, computed: int = SIZE,
              in_use: bool = False) -> list[Block]:
        """These blocks of a prompt, as another request left them on a rank, or as it has come so far."""
        other = self.request(1)
        made = self.cache.new_blocks(other, list(enumerate([rank] * len(blocks), 0)))
        for number, block in zip(blocks, made):
            block.index, block.computed = number, computed
            block.owner = other if computed < SIZE else None
            self.cache.publish(block, request.keys[number],
                               request.token_ids[number * SIZE:(number + 1) * SIZE].tobytes())
            if not in_use:
                self.cache.release(block, other)
        return made

    def place(self, request: Request, loads: Sequence[float] | None = None, reserve: int = 1,
              keep: int = 0) -> Placement | None:
        return self.placer.place(request, -(-len(request.token_ids) // SIZE), reserve,
                                 loads or [0.0] * self.pool.ring_size, keep)

    def placed(self, request: Request, loads: Sequence[float] | None = None, reserve: int = 1) -> Placement:
        placement = self.place(request, loads, reserve)
        assert placement is not None
        return placement


# How many ranks

@pytest.mark.parametrize("ring", [1, 2, 3, 4, 6, 8])
def test_short_prompts_take_one_rank_and_long_ones_more(ring: int) -> None:
    wide = Ring(ring)
    widths = [wide.placer.width_of(wide.request(1 << i)) for i in range(3, 18)]
    assert widths[0] == 1 and widths[-1] == ring
    assert widths == sorted(widths)
    assert set(widths) <= {1, 2, 4, 8, ring}


def test_more_ranks_must_pay_for_themselves() -> None:
    """Where a rank costs as much to talk to as it helps, nobody is wide."""
    ring = Ring()
    assert ring.placer.width_of(ring.request(20_000)) == 4
    ring.cost.weights[EXCHANGE] = 1.0
    assert ring.placer.width_of(ring.request(20_000)) == 1


def test_a_fixed_width_holds_for_every_length() -> None:
    for width in (1, 2, 3):
        ring = Ring(width=width)
        for tokens in (10, 1000, 100_000):
            assert ring.placer.width_of(ring.request(tokens)) == width
            assert len(ring.placed(ring.request(tokens)).ranks) == width
    wider = Ring(width=64)
    assert wider.placer.width_of(wider.request(10)) == 4


def test_wanted_ranks_are_used_and_no_others() -> None:
    ring = Ring(width=1)
    placement = ring.placed(ring.request(100, ranks=(3, 1)), reserve=4)
    assert placement.ranks == [1, 3] and set(placement.holders) == {1, 3}
    assert placement.reserve[0] == placement.reserve[2] == 0
    small = Ring(slots=3)
    assert small.place(small.request(100, ranks=(3, 1)), reserve=0) is None, "though others have room"


def test_a_prompt_too_large_for_one_ranks_slots_takes_more() -> None:
    ring = Ring(slots=10)
    ring.cost.weights[EXCHANGE] = 1.0  # nobody is wide without need
    assert ring.placer.width_of(ring.request(140)) == 1
    assert ring.placer.width_of(ring.request(170)) == 2
    assert ring.placer.width_of(ring.request(330)) == 4
    assert ring.placer.width_of(ring.request(140, output=200)) == 4, "its output counts"
    assert ring.placer.width_of(ring.request(10**5)) == 4, "whatever: it is not for the placer to refuse"


def test_a_narrow_request_spreads_when_no_rank_alone_has_room() -> None:
    ring = Ring(slots=10, width=1)
    placement = ring.placed(ring.request(16 * 16), reserve=2)
    assert placement.ranks == [0, 1, 2, 3] and [placement.holders.count(r) for r in range(4)] == [4] * 4
    assert ring.place(ring.request(16 * 39), reserve=2) is None


# Which

def test_the_least_loaded_rank_is_taken() -> None:
    ring = Ring()
    assert ring.placed(ring.request(10), loads=[3.0, 1.0, 0.5, 2.0]).ranks == [2]
    assert ring.placed(ring.request(10)).ranks == [0]
    ring.leave(ring.request(100), range(3), 0, in_use=True)
    assert ring.placed(ring.request(10, seed=5)).ranks == [1], "among equals the one with most room"


def test_a_wide_request_takes_the_least_loaded_ones() -> None:
    ring = Ring(width=2)
    placement = ring.placed(ring.request(160), loads=[3.0, 1.0, 0.5, 2.0])
    assert placement.ranks == [1, 2] and placement.holders.count(1) == placement.holders.count(2) == 5


# Found blocks

def test_nothing_is_found_of_another_prompt() -> None:
    ring = Ring()
    ring.leave(ring.request(160), range(8), 2)
    assert ring.placer.find(ring.request(160, seed=1)) == {}


def test_the_block_of_the_last_token_is_left_out() -> None:
    ring = Ring()
    ring.leave(ring.request(160), range(10), 2)
    assert list(ring.placer.find(ring.request(160))) == list(range(9))
    assert list(ring.placer.find(ring.request(161))) == list(range(10))
    assert ring.placer.find(ring.request(SIZE)) == {}
    assert ring.placer.find(ring.request(1)) == {}


@pytest.mark.parametrize("left", [[0], [0, 1, 2], [9], [3, 4, 7], [0, 2, 4, 6, 8]])
def test_blocks_are_found_around_holes(left: list[int]) -> None:
    ring = Ring()
    ring.leave(ring.request(160), left, 1)
    assert list(ring.placer.find(ring.request(161))) == left


def test_found_blocks_are_used_where_they_are() -> None:
    ring = Ring(width=1)
    request = ring.request(160)
    ring.leave(request, range(6), 2)
    narrow = ring.placed(request)
    assert narrow.ranks == [2] and narrow.holders == [2] * 10 and list(narrow.found) == list(range(6))
    wide = Ring(width=64)
    wide.leave(request, range(6), 2)
    placement = wide.placed(request)
    assert placement.ranks == [0, 1, 2, 3] and placement.holders[:6] == [2] * 6
    assert 2 not in placement.holders[6:], "new ones go to those who hold less"


def test_of_several_copies_the_one_is_used_whose_rank_holds_less() -> None:
    ring = Ring(width=64)
    request, user = ring.request(160), ring.request(1)
    for block in ring.leave(request, range(8), 2):
        ring.cache.use(block, user)
        ring.cache.add_copy(block, 0)
    holders = ring.placed(request).holders
    assert holders[:8].count(0) == holders[:8].count(2) == 4


def test_found_blocks_are_copied_when_that_is_cheaper_than_the_busier_rank() -> None:
    ring = Ring(width=1)
    request = ring.request(160)
    ring.leave(request, range(6), 2)
    copying = ring.cost.copy_seconds(6 * SIZE)
    stays = ring.placed(request, loads=[0.0, 0.0, 0.5 * copying, 0.0])
    assert stays.ranks == [2] and stays.holders == [2] * 10
    moves = ring.placed(request, loads=[0.0, 0.0, 2 * copying, 0.0])
    assert len(moves.ranks) == 1 and moves.ranks != [2]
    assert set(moves.holders) == set(moves.ranks) and list(moves.found) == list(range(6))


def test_blocks_that_are_being_computed_are_not_copied() -> None:
    ring = Ring(width=1)
    request = ring.request(160)
    ring.leave(request, range(3), 2, in_use=True)
    ring.leave(request, [3, 4], 2, computed=5, in_use=True)
    placement = ring.placed(request, loads=[1.0, 0.0, 99.0, 1.0])
    assert placement.holders[:5] == [1, 1, 1, 2, 2] and placement.ranks == [1, 2]
    assert set(placement.holders[5:]) == {1}


# Room

def test_a_rank_that_is_full_is_passed_over() -> None:
    ring = Ring(ring=2, slots=8, width=1)
    ring.leave(ring.request(200, seed=9), range(7), 0, in_use=True)
    placement = ring.placed(ring.request(60), loads=[0.0, 9.0], reserve=2)
    assert set(placement.holders) == {0, 1}, "all ranks, when the best has no room"


def test_slots_that_must_stay_free_stay_free() -> None:
    ring = Ring(ring=2, slots=8)
    assert ring.place(ring.request(96), reserve=0, keep=1) is not None
    assert ring.place(ring.request(16 * 14), reserve=0, keep=1) is not None
    assert ring.place(ring.request(16 * 15), reserve=0, keep=1) is None
    ring.pool.reserved = [7, 0]
    placement = ring.place(ring.request(96, ranks=(1,)), reserve=0, keep=2)
    assert placement is not None and placement.ranks == [1], "a rank that has less is none of its business"


def test_the_room_of_a_rank_that_is_kept_for_others_is_not_taken_by_using_its_idle_blocks() -> None:
    """All slots of rank 1 are set aside for another request's output, and in two of them are idle blocks: a request on
    rank 0 that copies those keeps them from being evicted."""
    ring = Ring(ring=2, slots=4, width=1)
    request = ring.request(33)
    ring.leave(request, [0, 1], 1)
    ring.pool.reserved[1] = 4
    placement = ring.place(ring.request(33, ranks=(0,)), reserve=0)
    assert placement is None or not placement.found


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(2, 10), st.sampled_from([None, 1, 2, 64]))
def test_room_is_never_promised_twice(data: st.DataObject, ring: int, slots: int, width: int | None) -> None:
    """Whatever was placed can be taken, and leaves what is set aside for others."""
    driven = Driven(ring=ring, slots=slots, block=4, width=width, prefix_cache=True)
    scheduler, cache, pool = driven.scheduler, driven.cache, driven.pool
    ranks = st.integers(0, ring - 1)
    other = driven.add("other", [1])
    scheduler.cancel("other")
    driven.ranks.tables.clear()
    prompt = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=30))
    keys = chain(cache.first_key(other.scheduling), array("I", prompt), 4, len(prompt) // 4)
    for number, key in enumerate(keys):
        kind = data.draw(st.sampled_from(["absent", "idle", "idle", "used", "partial"]))
        rank = data.draw(ranks)
        if kind == "absent" or cache.room_on(rank) <= 0:
            continue
        [block] = cache.new_blocks(other, list(enumerate([rank], number)))
        block.computed = 4 if kind != "partial" else data.draw(st.integers(0, 3))
        if kind != "partial":
            block.owner = None
        cache.publish(block, key, array("I", prompt)[number * 4:number * 4 + 4].tobytes())
        second = data.draw(ranks)
        if kind != "partial" and second != rank and cache.room_on(second) > 0 and data.draw(st.booleans()):
            cache.add_copy(block, second)
        if kind == "idle":
            cache.release(block, other)
    for rank in range(ring):
        used = data.draw(st.integers(0, max(0, cache.room_on(rank))))
        cache.new_blocks(other, list(enumerate([rank] * used, 0)))
        pool.reserved[rank] += data.draw(st.integers(0, max(0, cache.room_on(rank))))
    before = [cache.room_on(rank) for rank in range(ring)]
    assert all(room >= 0 for room in before)

    keep = data.draw(st.integers(0, 2))
    request = Request(request_id="r", handle=99, token_ids=array("I", prompt), params=SamplingParams(), seed=0,
                      end_token_ids=(), max_total_tokens=len(prompt) + 20, arrival=0.0)
    scheduler._prepare(request)
    blocks, reserve = -(-len(prompt) // 4), data.draw(st.integers(0, 4))
    loads = data.draw(st.lists(st.floats(0, 1), min_size=ring, max_size=ring))
    placement = scheduler._placer.place(request, blocks, reserve, loads, keep)
    if placement is None:
        found = scheduler._placer.find(request)
        pinned = [sum(rank in b.copies for b in found.values() if not b.users) for rank in range(ring)]
        room = [before[rank] - keep - pinned[rank] for rank in range(ring)]
        assert blocks - len(found) + reserve > sum(room) or min(room) < 0, "there was room"
        return
    assert len(placement.holders) == blocks and sum(placement.reserve) == reserve
    assert set(placement.holders) <= set(placement.ranks)
    scheduler._holdings.take(request, placement)
    cache.check()
    for rank in range(ring):
        after = cache.room_on(rank)
        assert after >= 0, "slots were promised that are not there"
        if request.held[rank] > sum(rank in b.copies for b in placement.found.values()) or placement.reserve[rank]:
            assert after >= keep, "what must stay free was taken"
    assert request.held == [request.holders.count(rank) for rank in range(ring)]
    copies = scheduler._holdings.copies
    assert len(copies) == len({(c.destination, *c.destination_slots) for c in copies})
