"""Requests that share blocks: computed once, by whoever is first, and right for all. `FakeRanks` checks every key."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringserve.cost_model import SENT_BYTE
from ringserve.plan import SchedulerOutput
from ringserve.policy import POLICIES
from ringserve.request import RequestStatus
from ringserve.scheduling_params import SchedulingParams
from tests.ringserve.fake_ranks import VOCABULARY, Driven, layer_group

RINGS = [(1, 1), (2, 1), (2, 2), (3, None), (4, 2), (4, 64)]
"""Ring sizes and widths."""
BLOCK = 4


def prompt(length: int, seed: int = 1) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCABULARY) for _ in range(length)]


def drive(ring: int = 2, width: int | None = 1, **options: Any) -> Driven:
    defaults = {"block": BLOCK, "slots": 200, "chunk": 16, "prefix_cache": True}
    return Driven(ring=ring, width=width, **{**defaults, **options})


def run(driven: Driven) -> None:
    """To the end, but keep what is cached."""
    for _ in range(3000):
        if not driven.scheduler.has_work:
            return
        driven.step()
    raise AssertionError("no end")


def cached_tokens(driven: Driven, name: str) -> int:
    usage = driven.ended[name].usage
    assert usage is not None
    return usage.cached_tokens


def tokens_of(plan: SchedulerOutput, driven: Driven, name: str) -> int:
    handle = driven.requests[name].handle
    return sum(stop - start for rows in plan.rows if rows.handle == handle for start, stop in rows.spans)


def right(driven: Driven) -> None:
    for name in driven.requests:
        if name in driven.ended:
            driven.assert_right(name)


# In flight

@pytest.mark.parametrize("ring, width", RINGS)
@pytest.mark.parametrize("length", [40, 41, 43, 3, 4, 5])
def test_two_equal_prompts_in_flight_are_computed_once(ring: int, width: int | None, length: int) -> None:
    driven = drive(ring, width)
    for name in "ab":
        driven.add(name, prompt(length), max_tokens=3)
    run(driven)
    shared = (length - 1) // BLOCK * BLOCK
    assert driven.ranks.computed == length + (length - shared) + 2 * 2
    assert (cached_tokens(driven, "a"), cached_tokens(driven, "b")) == (0, shared)
    right(driven)
    driven.finish()


def test_the_second_waits_for_the_firsts_blocks_and_not_for_its_request() -> None:
    driven = drive(policy="srpt", ride_along=False)
    ids = prompt(40)
    driven.add("a", ids + prompt(60, seed=2), max_tokens=30)
    driven.step()
    driven.add("b", ids + prompt(2, seed=3), max_tokens=2)
    while "b" not in driven.ended:
        driven.step()
        assert driven.now < 1.0
    assert driven.requests["a"].status is RequestStatus.RUNNING and not driven.output["a"], "a is still at its prompt"
    assert cached_tokens(driven, "b") == 40
    driven.finish()
    right(driven)


def test_a_request_that_waits_holds_up_nobody() -> None:
    """The rest of the chunk goes to others while it waits for blocks."""
    driven = drive()
    driven.add("a", prompt(60))
    driven.add("b", prompt(60))
    driven.add("c", prompt(60, seed=2))
    seen = [[tokens_of(plan, driven, name) for name in "abc"] for plan in (driven.step() for _ in range(8))]
    assert [row[0] for row in seen[:3]] == [16, 16, 16]
    assert seen[3] == [12, 0, 4], "b's last block waits for the one before it"
    assert all(sum(row) == 16 for row in seen[:5])
    driven.finish()
    right(driven)


@pytest.mark.parametrize("ring, width", RINGS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("chunk", [8, 10])
def test_when_the_first_is_cancelled_the_oldest_waiter_goes_on(ring: int, width: int | None, steps: int,
                                                              chunk: int) -> None:
    driven = drive(ring, width, chunk=chunk)
    for name in "abc":
        driven.add(name, prompt(40), max_tokens=1)
    for _ in range(steps):
        driven.step()
    done = driven.ranks.computed
    assert driven.scheduler.cancel("a")
    plan = driven.step()
    assert tokens_of(plan, driven, "b") > 0 and tokens_of(plan, driven, "c") == 0
    run(driven)
    tail = 40 - 36
    assert driven.ranks.computed == 40 + tail, "nothing is computed twice but the last block, which is not shared"
    assert cached_tokens(driven, "b") == min(done, 36)
    assert cached_tokens(driven, "c") == 36
    right(driven)
    driven.finish()


@pytest.mark.parametrize("steps", range(1, 6))
def test_of_prompts_that_part_each_goes_on_where_the_first_was_cancelled(steps: int) -> None:
    driven = drive(chunk=10)
    ids = prompt(30)
    driven.add("a", ids, max_tokens=2)
    for name in "bc":
        driven.add(name, ids[:20] + prompt(14, seed=ord(name)), max_tokens=2)
    for _ in range(steps):
        driven.step()
    driven.scheduler.cancel("a")
    run(driven)
    right(driven)
    once = 20 + 14 + 14 + 2
    assert once <= driven.ranks.computed <= once + 10 + 1, "what only a wanted, and no more"
    driven.finish()


def test_all_are_cancelled_but_the_last() -> None:
    driven = drive(chunk=6)
    for name in "abcd":
        driven.add(name, prompt(50), max_tokens=2)
    for name in "abc":
        driven.step()
        driven.step()
        driven.scheduler.cancel(name)
        driven.scheduler.check()
    run(driven)
    assert driven.ranks.computed == 50 + 1
    assert cached_tokens(driven, "d") == 36
    right(driven)


def test_the_first_fails_and_the_second_goes_on() -> None:
    driven = drive()
    broken = driven.add("a", prompt(20), max_tokens=2)
    driven.add("b", prompt(50), max_tokens=2)
    driven.ranks.errors[broken.handle] = "logits that are not finite"
    run(driven)
    assert driven.ended["a"].finish_reason == "error"
    driven.assert_right("b")
    driven.finish()


# One after the other

@pytest.mark.parametrize("ring, width", RINGS)
def test_a_longer_prompt_computes_only_the_rest(ring: int, width: int | None) -> None:
    driven = drive(ring, width)
    driven.add("a", prompt(42), max_tokens=1)
    run(driven)
    assert driven.ranks.computed == 42
    driven.add("b", prompt(42) + prompt(30, seed=2), max_tokens=1)
    run(driven)
    assert driven.ranks.computed == 42 + 72 - 40 and cached_tokens(driven, "b") == 40
    driven.add("c", prompt(42)[:22], max_tokens=1)
    run(driven)
    assert driven.ranks.computed == 74 + 2 and cached_tokens(driven, "c") == 20
    right(driven)
    driven.finish()


@pytest.mark.parametrize("ring, width", RINGS)
@pytest.mark.parametrize("length", [4, 39, 40, 41])
def test_a_full_hit_computes_the_last_block_only(ring: int, width: int | None, length: int) -> None:
    driven = drive(ring, width)
    driven.add("a", prompt(length), max_tokens=1)
    run(driven)
    for again in range(3):
        before = driven.ranks.computed
        driven.add(f"b{again}", prompt(length), max_tokens=1)
        plan = driven.step()
        rest = length - (length - 1) // BLOCK * BLOCK
        assert plan.num_tokens == driven.ranks.computed - before == rest and 1 <= rest <= BLOCK
        assert cached_tokens(driven, f"b{again}") == length - rest
    right(driven)
    driven.finish()


@pytest.mark.parametrize("ring, width", RINGS)
def test_the_next_turn_finds_the_output_of_the_last(ring: int, width: int | None) -> None:
    driven = drive(ring, width)
    history = prompt(21)
    known = 0
    for turn in range(5):
        name = f"turn{turn}"
        driven.add(name, history, max_tokens=17)
        run(driven)
        assert cached_tokens(driven, name) == known
        history = history + driven.output[name]
        known = (len(history) - 1) // BLOCK * BLOCK  # the last token was never computed
        history = history + prompt(9, seed=turn)
    right(driven)
    driven.finish()


def test_a_conversation_grows_over_more_ranks_without_moving_old_blocks() -> None:
    driven = drive(ring=4, width=None, slots=2000, chunk=256)
    history: list[int] = []
    widths, before = [], {}
    for turn, more in enumerate((8, 40, 200, 1000, 3000)):
        history = history + prompt(more, seed=turn)
        name = f"turn{turn}"
        request = driven.add(name, history, max_tokens=3)
        driven.step()
        widths.append(len(request.ranks))
        here = {i: dict(block.copies) for i, block in enumerate(request.blocks)}
        for i, copies in before.items():
            assert copies.items() <= here[i].items(), "an old block moved"
        run(driven)
        history = history + driven.output[name]
        before = {i: copies for i, copies in here.items() if i < (len(history) - 4) // BLOCK}
    assert widths[0] == 1 and widths[-1] == 4 and widths == sorted(widths)
    right(driven)
    driven.finish()


@pytest.mark.parametrize("steps, whole", [(1, 12), (2, 24), (3, 36)])
def test_a_cancelled_request_leaves_its_finished_blocks(steps: int, whole: int) -> None:
    driven = drive(chunk=13)
    driven.add("a", prompt(60))
    for _ in range(steps):
        driven.step()
    driven.scheduler.cancel("a")
    driven.add("b", prompt(60), max_tokens=1)
    run(driven)
    assert cached_tokens(driven, "b") == whole
    right(driven)


def test_a_parked_request_finds_its_blocks_again() -> None:
    driven = drive(ring=1, slots=12, chunk=64, reserve=1)
    driven.add("a", prompt(16), max_tokens=28)
    driven.add("b", prompt(12, seed=2), max_tokens=20)
    run(driven)
    assert driven.scheduler.parked >= 1
    work = 16 + 27 + 12 + 19
    assert work < driven.ranks.computed < work + 12 + 20, "less than all of it again"
    assert cached_tokens(driven, "a") == cached_tokens(driven, "b") == 0, "its own blocks are no cache hit"
    right(driven)
    driven.finish()


def test_a_request_that_is_parked_in_its_prompt_counts_no_token_twice() -> None:
    """A part of a block is lost when it is parked, and computed again."""
    driven = drive(ring=1, slots=30, chunk=10, reserve=1)
    driven.add("warm", prompt(20), max_tokens=1)
    run(driven)
    request = driven.add("b", prompt(60), max_tokens=1)
    driven.step()
    assert (request.cached_tokens, request.done) == (0, 30)
    driven.scheduler._park(request)
    driven.scheduler.check()
    run(driven)
    assert cached_tokens(driven, "b") == 20
    right(driven)


@pytest.mark.parametrize("one, other", [
    (SchedulingParams(tenant="a"), SchedulingParams(tenant="b")),
    (SchedulingParams(cache_salt="a"), SchedulingParams(cache_salt="b")),
    (SchedulingParams(), SchedulingParams(cache_salt="b")),
    (SchedulingParams(tenant="a", cache_salt="b"), SchedulingParams(tenant="ab")),
    (SchedulingParams(tenant="a"), SchedulingParams(cache_salt="a")),
])
@pytest.mark.parametrize("together", [True, False])
def test_other_tenants_and_salts_compute_for_themselves(one: SchedulingParams, other: SchedulingParams,
                                                       together: bool) -> None:
    driven = drive()
    for i, scheduling in enumerate((one, other, one, other)):
        driven.add(f"r{i}", prompt(40), max_tokens=1, scheduling=scheduling)
        if not together:
            run(driven)
    run(driven)
    assert driven.ranks.computed == 2 * (40 + 4)
    assert sorted(cached_tokens(driven, f"r{i}") for i in range(4)) == [0, 0, 36, 36]
    right(driven)


def test_a_cache_that_is_off_computes_everything() -> None:
    driven = drive(prefix_cache=False)
    for i in range(4):
        driven.add(f"r{i}", prompt(40), max_tokens=1)
        if i % 2:
            run(driven)
    assert driven.ranks.computed == 4 * 40 and sum(driven.cache._idle) == 0
    assert all(cached_tokens(driven, f"r{i}") == 0 for i in range(4))
    right(driven)
    driven.finish()


# Little room

@pytest.mark.parametrize("ring, width", RINGS)
@pytest.mark.parametrize("policy", ["fcfs", "srpt"])
def test_eviction_never_gives_wrong_tokens(ring: int, width: int | None, policy: Any) -> None:
    source = random.Random(ring)
    driven = drive(ring, width, slots=40 // ring, running=4, policy=policy)
    for number in range(60):
        ids = prompt(24, seed=source.randrange(5))[:source.randrange(4, 25)] + prompt(
            source.randrange(1, 20), seed=source.randrange(3))
        driven.add(f"r{number}", ids, max_tokens=source.randrange(1, 12))
        for _ in range(source.randrange(0, 6)):
            if driven.scheduler.has_work:
                driven.step()
    run(driven)
    assert driven.cache.evicted > 20 and len(driven.ended) == 60
    assert any(cached_tokens(driven, name) for name in driven.ended)
    right(driven)
    driven.finish()


def test_a_lost_block_in_the_middle_is_computed_alone() -> None:
    driven = drive(ring=1, width=1)
    driven.add("a", prompt(60), max_tokens=1)
    run(driven)
    key = driven.requests["a"].keys[5]
    block = driven.cache._blocks[key]
    driven.cache._idle[0] -= 1
    driven.cache._drop(block)
    driven.cache.check()
    before = driven.ranks.computed
    driven.add("b", prompt(60), max_tokens=1)
    plan = driven.step()
    assert plan.rows[0].spans == [(20, 24), (56, 60)]
    assert driven.ranks.computed - before == 8 and cached_tokens(driven, "b") == 52
    right(driven)
    driven.finish()


# A hot prefix

def test_a_hot_prefix_is_copied_to_other_ranks_when_its_own_is_busy() -> None:
    driven = drive(ring=4, width=1, slots=400, running=40, policy="srpt", max_step_ms=20.0, chunk=256)
    system = prompt(40)
    driven.add("warm", [*system, 1], max_tokens=1)
    run(driven)
    for i in range(16):
        driven.add(f"chat{i}", system + prompt(200, seed=i), max_tokens=4)
    ranks = set()
    while driven.scheduler.has_work:
        driven.step()
        for request in driven.scheduler._running.values():
            assert len(request.ranks) == 1, "a chat stays narrow"
            ranks.add(request.ranks[0])
    assert driven.ranks.copied > 0 and ranks == {0, 1, 2, 3}
    assert driven.ranks.copied <= 3 * 10, "once to each rank"
    assert all(cached_tokens(driven, f"chat{i}") == 40 for i in range(16))
    assert driven.ranks.computed == 41 + 16 * (200 + 3)
    right(driven)
    driven.finish()


def test_a_prefix_is_not_copied_where_copies_are_dear() -> None:
    driven = drive(ring=2, width=1, slots=400, running=40)
    driven.add("warm", prompt(41), max_tokens=1)
    run(driven)
    driven.cost.weights[SENT_BYTE] = 1.0
    for i in range(6):
        driven.add(f"chat{i}", prompt(41) + prompt(100, seed=i), max_tokens=2)
    driven.step()
    assert driven.ranks.copied == 0
    assert {tuple(r.ranks) for r in driven.scheduler._running.values()} == {(0,)}


def test_a_request_is_cancelled_in_the_step_that_copies_for_it() -> None:
    driven = drive(ring=2, width=1, slots=100)
    driven.add("warm", prompt(41), max_tokens=1)
    run(driven)
    driven.add("busy", prompt(41) + prompt(100, seed=1), max_tokens=2)
    driven.step()
    driven.add("b", prompt(41) + prompt(100, seed=2), max_tokens=2)
    plan = driven.scheduler.schedule()
    assert len(plan.copies) == 10
    driven.scheduler.cancel("b")
    driven.commit(plan)
    driven.add("c", prompt(41) + prompt(100, seed=3), max_tokens=2)
    run(driven)
    assert driven.ranks.copied == 10, "the copies are there for the next one"
    right(driven)
    driven.finish()


# Whatever comes

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 4), st.sampled_from([None, 1, 2, 64]), st.sampled_from(sorted(POLICIES)),
       st.integers(6, 30), st.sampled_from([None, 1.0, 4.0]), st.integers(1, 2))
def test_random_sharing(data: st.DataObject, ring: int, width: int | None, policy: Any, slots: int,
                        max_step_ms: float | None, groups: int) -> None:
    """Prompts that part at random places, conversations, cancels: every token right, every count exact."""
    driven = drive(ring, width, slots=slots, policy=policy, max_step_ms=max_step_ms, reserve=2, running=5,
                   groups=[layer_group(), layer_group(window=6)][:groups])
    histories: list[list[int]] = [[]]
    for number in range(data.draw(st.integers(2, 10))):
        kept = data.draw(st.sampled_from(histories))
        ids = kept[:data.draw(st.integers(0, len(kept)))] + prompt(data.draw(st.integers(1, 20)), seed=number % 3)
        ids = ids[:driven.capacity - 12]
        driven.add(f"r{number}", ids, max_tokens=data.draw(st.integers(1, 10)))
        for _ in range(data.draw(st.integers(0, 8))):
            if driven.scheduler.has_work:
                driven.step()
        if data.draw(st.integers(0, 5)) == 0:
            driven.scheduler.cancel(f"r{data.draw(st.integers(0, number))}")
        histories.append(ids + driven.output[f"r{number}"])
    run(driven)
    for name, request in driven.requests.items():
        if name in driven.ended:
            driven.assert_right(name)
            assert 0 <= cached_tokens(driven, name) <= (request.prompt_tokens - 1) // BLOCK * BLOCK or (
                driven.scheduler.parked)
    driven.finish()


def with_copies_on_both_ranks(slots: int) -> Driven:
    """A ring of two, whose cache holds two copies of each block of a prefix of 16 tokens."""
    driven = Driven(ring=2, slots=slots, block=4, prefix_cache=True, width=1, reserve=1)
    prefix = list(range(1, 17))
    driven.add("first", [*prefix, 20], max_tokens=1)
    while driven.scheduler.has_work:
        driven.step()
    for block in driven.cache._blocks.values():
        # As a second narrow request on the other rank would have left it.
        [rank] = block.copies
        request = driven.requests["first"]
        driven.cache.use(block, request)
        copy = driven.cache.add_copy(block, 1 - rank)
        for i in range(4):
            driven.ranks.stored[copy.rank, 0, copy.slots[0] * 4 + i] = driven.ranks.stored[
                rank, 0, block.copies[rank].slots[0] * 4 + i]
        driven.cache.release(block, request)
    assert all(len(block.copies) == 2 for block in driven.cache._blocks.values())
    return driven


def test_spare_copies_make_room_for_one_that_grows() -> None:
    driven = with_copies_on_both_ranks(slots=5)
    driven.add("whole", [*range(1, 17), 21], max_tokens=40 - 17)
    driven.finish()
    driven.assert_right("whole")


def test_spare_copies_do_not_keep_a_request_waiting_for_ever() -> None:
    driven = with_copies_on_both_ranks(slots=5)
    driven.add("whole", [*range(1, 17), *range(2, 22)], max_tokens=4)
    driven.finish()
    driven.assert_right("whole")
