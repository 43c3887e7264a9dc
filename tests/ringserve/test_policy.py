"""Policies on one machine that serves whoever is first for a slice at a time: Medha's example, and nobody starves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringserve.config import PolicyName
from ringserve.packing import LEAST_SHARE
from ringserve.plan import SchedulerOutput
from ringserve.policy import FLOOR_STEPS, POLICIES, SHORT_STEPS, Prospect
from ringserve.scheduling_params import SchedulingParams
from tests.ringserve.fake_ranks import VOCABULARY, Driven

ALL: list[PolicyName] = sorted(POLICIES)
SLICE = 0.1


@dataclass
class Job:
    name: str
    arrival: float
    seconds: float
    deadline: float


def serve(policy: PolicyName, jobs: Iterable[Job], step_s: float = SLICE, until: float = 1e4,
          slice_s: float = SLICE) -> dict[str, float]:
    """When each job ends, as far as it does before `until`. `jobs` in order of arrival, perhaps without end."""
    key, coming = POLICIES[policy], iter(jobs)
    now, ended, waiting = 0.0, {}, {}  # type: float, dict[str, float], dict[str, Prospect]
    following = next(coming, None)
    while now < until and (waiting or following):
        while following is not None and following.arrival <= now + 1e-9:
            waiting[following.name] = Prospect(following.arrival, following.deadline, following.seconds,
                                               following.seconds)
            following = next(coming, None)
        if not waiting:
            assert following is not None
            now = following.arrival
            continue
        name, first = min(waiting.items(), key=lambda item: key(item[1], now, step_s))
        worked = min(slice_s, first.remaining_s)
        now += worked
        first.remaining_s -= worked
        if first.remaining_s < 1e-9:
            ended[name] = now
            del waiting[name]
    return ended


MEDHA = [Job("long", 0.0, 10.0, 16.0), Job("a", 5.0, 0.5, 6.0), Job("b", 5.0, 0.5, 6.0)]


def missed(policy: PolicyName, step_s: float) -> set[str]:
    ended = serve(policy, MEDHA, step_s)
    assert ended.keys() == {"long", "a", "b"} and max(ended.values()) == pytest.approx(11.0)
    return {job.name for job in MEDHA if ended[job.name] > job.deadline + 1e-6}


@pytest.mark.parametrize("policy", ["edf", "srpt"])
def test_medhas_example_is_met_by_deadline_and_by_size(policy: PolicyName) -> None:
    assert missed(policy, SLICE) == set()


@pytest.mark.parametrize("policy", ["slack", "fcfs"])
def test_medhas_example_is_missed_by_relative_slack_alone(policy: PolicyName) -> None:
    """The long one is first until the short ones have no slack left, and there are two of them."""
    assert missed(policy, SLICE) & {"a", "b"} and "long" not in missed(policy, SLICE)


@pytest.mark.parametrize("step_s", [0.2, 0.3, 0.5])
def test_medhas_example_is_met_with_a_floor(step_s: float) -> None:
    assert missed("slack-floor", step_s) == set()


def shorts(load: float, seconds: float = 0.3, urgent: float = 1.0) -> Iterable[Job]:
    """A stream of short requests without end, with the default deadlines."""
    number = 0
    while True:
        at = number * seconds / load
        yield Job(f"short{number}", at, seconds, at + urgent + 3 * seconds)
        number += 1


def beside(stream: Iterable[Job], *others: Job) -> Iterable[Job]:
    left = sorted(others, key=lambda j: j.arrival)
    for job in stream:
        while left and left[0].arrival <= job.arrival:
            yield left.pop(0)
        yield job


LONG = Job("long", 1.0, 10.0, 1.0 + 1.0 + 30.0)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_a_long_request_is_not_starved_by_a_stream_of_short_ones(policy: PolicyName, load: float) -> None:
    """What the stream leaves is at least its own: no policy that never idles needs more."""
    ended = serve(policy, beside(shorts(load), LONG), until=300.0)
    assert ended["long"] <= LONG.arrival + (LONG.seconds + 2) / (1 - load)


@pytest.mark.parametrize("policy, load, until", [
    ("fcfs", 1.2, 100), ("edf", 1.2, 100), ("slack", 1.0, 500), ("srpt", 1.0, 3000), ("slack-floor", 1.0, 500),
    ("slack-floor", 1.2, 300)])
def test_a_long_request_comes_to_its_turn_when_short_ones_alone_fill_the_time(policy: PolicyName, load: float,
                                                                            until: float) -> None:
    """In the end, also beside more of them than can be served."""
    assert "long" in serve(policy, beside(shorts(load), LONG), until=until)


@pytest.mark.parametrize("policy", ALL)
def test_a_short_request_is_not_starved_by_long_ones(policy: PolicyName) -> None:
    """Long prompts queue up; all but the one that asks for nothing serve a short one soon."""
    longs = [Job(f"long{i}", 0.01 * i, 10.0, 31.0 + 0.01 * i) for i in range(6)]
    ended = serve(policy, [*longs, Job("short", 5.0, 0.2, 6.6)])
    assert ended["short"] <= (61.0 if policy == "fcfs" else 6.6 + SLICE)


@pytest.mark.parametrize("policy", ALL)
def test_whoever_waits_becomes_more_urgent_or_stays_so(policy: PolicyName) -> None:
    """Against a newcomer of any size there is a time from which it is first."""
    for own, other in ((10.0, 0.2), (0.2, 10.0), (1.0, 1.0)):
        old = Prospect(0.0, 1.0 + 3 * own, own, own)
        newcomer = [Prospect(now, now + 1.0 + 3 * other, other, other) for now in (1e5, 1e6)]
        for now, new in zip((1e5, 1e6), newcomer):
            assert POLICIES[policy](old, now, SLICE) < POLICIES[policy](new, now, SLICE)


@given(st.sampled_from(ALL), st.floats(0, 1e3), st.floats(1e-3, 1e3), st.floats(1e-6, 1e4), st.floats(0, 1),
       st.floats(0, 1e4), st.sampled_from([1e-3, 0.1, float("inf")]))
def test_keys_are_numbers_whatever_the_request(policy: PolicyName, arrival: float, wish: float, total: float,
                                               left: float, waited: float, step_s: float) -> None:
    key = POLICIES[policy](Prospect(arrival, arrival + wish, total, left * total), arrival + waited, step_s)
    assert all(k == k for k in key)


def test_the_floor_is_for_short_ones_within_a_few_steps_of_their_deadline() -> None:
    def first(total: float, slack: float) -> bool:
        return POLICIES["slack-floor"](Prospect(0.0, slack + total, total, total), 0.0, 1.0)[0] == 0.0

    assert first(SHORT_STEPS, FLOOR_STEPS - 0.1) and not first(SHORT_STEPS, FLOOR_STEPS)
    assert not first(SHORT_STEPS + 0.1, FLOOR_STEPS - 0.1), "a long one has its slack in relative terms"


# A step's budget, in the scheduler

def prompt(length: int, seed: int = 1) -> list[int]:
    return [(i * 7 + seed) % VOCABULARY for i in range(length)]


def tokens_of(plan: SchedulerOutput, driven: Driven, name: str) -> int:
    handle = driven.requests[name].handle
    return sum(stop - start for rows in plan.rows if rows.handle == handle for start, stop in rows.spans)


def each_step(driven: Driven, look: Callable[[SchedulerOutput, float, float], None], most: int = 3000) -> None:
    """Run to the end; look at each plan, its predicted seconds and those of its decoding rows alone."""
    steps = 0
    while driven.scheduler.has_work:
        weights = list(driven.cost.weights)  # before the step is observed
        plan = driven.scheduler.schedule()
        step = driven.scheduler.step_cost
        seconds = step.seconds()
        base = [0.0] * driven.pool.ring_size
        for request, rows in driven.scheduler._in_flight:
            if rows.spans == [(len(request.token_ids) - 1, len(request.token_ids))] and request.decode_work:
                for rank, features in request.decode_work:
                    base[rank] += sum(a * b for a, b in zip(features, weights))
        look(plan, seconds, max(base) + weights[0])
        driven.commit(plan)
        steps += 1
        assert steps < most


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("ring, width", [(1, 1), (2, None), (3, 64), (4, 1)])
@pytest.mark.parametrize("budget_ms", [3.5, 6.0, 20.0])
def test_no_step_is_predicted_above_its_budget_but_for_the_least_slice(policy: PolicyName, ring: int,
                                                                      width: int | None, budget_ms: float) -> None:
    driven = Driven(ring=ring, slots=400, block=4, chunk=256, running=20, policy=policy, width=width,
                    max_step_ms=budget_ms)
    driven.add("long", prompt(900), max_tokens=2)
    budget = budget_ms / 1000
    for i in range(4):
        driven.add(f"short{i}", prompt(10 + 7 * i, seed=i), max_tokens=12)
    later = iter(range(4, 12))
    full = 0

    def look(plan: SchedulerOutput, seconds: float, base: float) -> None:
        nonlocal full
        decoding = {r.handle for r in driven.scheduler._decoding.values()}
        prefill = sum(b - a for rows in plan.rows if rows.handle not in decoding for a, b in rows.spans)
        if prefill > driven.block:
            assert seconds <= max(budget, base + LEAST_SHARE * budget) * 1.001
            full += seconds > 0.6 * budget
        if (number := next(later, None)) is not None:
            driven.add(f"short{number}", prompt(10 + 5 * number, seed=number), max_tokens=12)

    each_step(driven, look)
    for name in driven.requests:
        driven.assert_right(name)
    assert full or budget_ms != 6.0, "the budget is used, too"


@pytest.mark.parametrize("policy", [p for p in ALL if p != "fcfs"])
@pytest.mark.parametrize("ring", [1, 3])
def test_several_short_requests_ride_along_beside_a_long_prefill(policy: PolicyName, ring: int) -> None:
    driven = Driven(ring=ring, slots=1000, block=4, chunk=256, running=20, policy=policy, width=None, max_step_ms=20.0)
    driven.add("long", prompt(2500), max_tokens=2)
    driven.step()
    for i in range(4):
        driven.add(f"short{i}", prompt(12, seed=i), max_tokens=4)
    plan = driven.step()
    assert [tokens_of(plan, driven, f"short{i}") for i in range(4)] == [12] * 4
    assert tokens_of(plan, driven, "long") > 0, "and the long one goes on"
    driven.finish()


def test_without_riding_along_the_policy_alone_decides() -> None:
    driven = Driven(ring=1, slots=1000, block=4, chunk=256, policy="fcfs", ride_along=False, max_step_ms=20.0)
    driven.add("long", prompt(2500), max_tokens=2)
    driven.step()
    driven.add("short", prompt(12))
    assert tokens_of(driven.step(), driven, "short") == 0


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("budget_ms", [1.0, 6.0, 20.0])
def test_decoding_rows_are_in_every_step(policy: PolicyName, budget_ms: float) -> None:
    driven = Driven(ring=2, slots=600, block=4, chunk=64, running=10, policy=policy, width=None, max_step_ms=budget_ms)
    for i in range(3):
        driven.add(f"chat{i}", prompt(5, seed=i), max_tokens=60)
    while len(driven.scheduler._decoding) < 3:
        driven.step()
    driven.add("long", prompt(400), max_tokens=2)
    done = 0
    while not any(f"chat{i}" in driven.ended for i in range(3)):
        plan = driven.step()
        assert [tokens_of(plan, driven, f"chat{i}") for i in range(3)] == [1, 1, 1]
        if "long" not in driven.ended:
            assert tokens_of(plan, driven, "long") > 0, "decoding alone may fill a step: a slice is guaranteed"
            done += 1
    assert done
    driven.finish()


@pytest.mark.parametrize("policy", ALL)
def test_a_long_prefill_goes_on_in_a_stream_of_short_ones(policy: PolicyName) -> None:
    driven = Driven(ring=1, slots=1500, block=4, chunk=128, running=30, policy=policy, max_step_ms=8.0)
    driven.add("long", prompt(1500), max_tokens=2)
    alone_s = driven.requests["long"].total_s
    number = 0
    while "long" not in driven.ended:
        while driven.scheduler.num_waiting + driven.scheduler.num_running < 12:
            driven.add(f"short{number}", prompt(64, seed=number), max_tokens=1)
            number += 1
        driven.step()
        assert driven.now < 1.0 + 20 * alone_s, "starved"
    assert number > 3


@pytest.mark.parametrize("policy", [p for p in ALL if p != "fcfs"])
def test_a_short_request_is_not_starved_by_a_long_one_where_decoding_fills_the_step(policy: PolicyName) -> None:
    driven = Driven(ring=1, slots=2000, block=4, chunk=128, running=30, policy=policy, max_step_ms=8.0)
    for i in range(8):
        driven.add(f"chat{i}", prompt(5, seed=i), max_tokens=300)
    while len(driven.scheduler._decoding) < 8:
        driven.step()
    driven.scheduler.forecast.budget.step_s = 0.9 * driven.scheduler.step_cost.seconds()
    driven.add("long", prompt(2000), max_tokens=1)
    driven.step()
    driven.add("short", prompt(8, seed=9), max_tokens=1)
    for _ in range(30):
        driven.step()
    assert "short" in driven.ended and "long" not in driven.ended
    driven.finish()


@pytest.mark.parametrize("policy", [p for p in ALL if p != "fcfs"])
def test_a_deadline_of_ones_own_and_a_priority_move_one_forward(policy: PolicyName) -> None:
    for scheduling in (SchedulingParams(deadline_s=0.05), SchedulingParams(priority=-8)):
        driven = Driven(ring=1, slots=1000, block=4, chunk=64, policy=policy, max_step_ms=10.0)
        for name in ("one", "two", "three"):
            driven.add(name, prompt(600, seed=len(name)), max_tokens=1)
        driven.add("urgent", prompt(600, seed=9), max_tokens=1, scheduling=scheduling)
        driven.finish()
        assert next(iter(driven.ended)) == "urgent"
