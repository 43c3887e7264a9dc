"""The scheduler against ranks that know only the plans: who runs, what is told, and that nothing is lost."""

from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ringserve.errors import InvalidValueError
from ringserve.outputs import TokenLogprob
from ringserve.plan import ModelOutput, SampledTokens, SchedulerOutput
from ringserve.policy import POLICIES
from ringserve.request import RequestStatus
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams
from tests.ringserve.fake_ranks import END, VOCABULARY, Driven, expected_output, layer_group


def prompt(length: int, seed: int = 1) -> list[int]:
    return [(i * 7 + seed) % VOCABULARY for i in range(length)]


def tokens_of(plan: SchedulerOutput, driven: Driven, name: str) -> int:
    handle = driven.requests[name].handle
    return sum(stop - start for rows in plan.rows if rows.handle == handle for start, stop in rows.spans)


def test_a_prompt_is_computed_in_chunks_that_fill_the_budget() -> None:
    driven = Driven(chunk=32)
    driven.add("a", prompt(100))
    plans = driven.finish()
    assert [plan.num_tokens for plan in plans] == [32, 32, 32, 4, 1, 1, 1]
    assert [plan.rows[0].sample for plan in plans] == [False, False, False, True, True, True, True]
    driven.assert_right("a")


def test_prompts_share_a_step_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    driven = Driven(chunk=32)
    for name, length in (("a", 20), ("b", 30), ("c", 5)):
        driven.add(name, prompt(length))
    first = driven.step()
    assert [tokens_of(first, driven, name) for name in "abc"] == [20, 12, 0]
    second = driven.step()
    assert [tokens_of(second, driven, name) for name in "abc"] == [1, 18, 5]


def test_decoding_never_starves_beside_a_long_prompt() -> None:
    driven = Driven(chunk=8, running=8, slots=200)
    for name in "abc":
        driven.add(name, prompt(2), max_tokens=30)
    driven.step()
    driven.add("long", prompt(300))
    while driven.requests["long"].done < 300 and "a" not in driven.ended:
        plan = driven.step()
        assert [tokens_of(plan, driven, name) for name in "abc"] == [1, 1, 1]
        assert tokens_of(plan, driven, "long") == 5
    driven.finish()
    for name in ("a", "b", "c", "long"):
        driven.assert_right(name)


def test_first_come_first_served() -> None:
    driven = Driven(chunk=8, running=3, slots=100)
    names = [f"r{i}" for i in range(7)]
    for name in names:
        driven.add(name, prompt(20), max_tokens=2)
    first_tokens: list[str] = []
    while driven.scheduler.has_work:
        driven.step()
        first_tokens += [u.request_id for u in driven.updates if len(driven.output[u.request_id]) == 1]
    assert first_tokens == names


def test_at_most_so_many_run_at_once() -> None:
    driven = Driven(running=2)
    for name in "abc":
        driven.add(name, prompt(3))
    driven.step()
    assert (driven.scheduler.num_running, driven.scheduler.num_waiting) == (2, 1)
    driven.finish()


def test_admission_reserves_blocks_for_the_output() -> None:
    driven = Driven(ring=2, slots=5, block=4, reserve=8)
    driven.add("a", prompt(16), max_tokens=100)  # 4 blocks and 2 in reserve
    driven.add("b", prompt(12), max_tokens=4)  # 3 and 1: 4 are left
    driven.add("c", prompt(1), max_tokens=1)  # first come, first served: it waits behind b
    driven.step()
    assert driven.scheduler.num_running == 2
    assert sum(driven.pool.reserved) == 3
    assert sum(driven.cache.room_on(rank) for rank in range(2)) == 0
    assert driven.requests["c"].status is RequestStatus.WAITING


def test_a_request_that_does_not_fit_waits_and_then_runs() -> None:
    driven = Driven(ring=2, slots=4, block=4, reserve=4)
    driven.add("a", prompt(20), max_tokens=2)
    driven.add("b", prompt(20), max_tokens=2)
    driven.step()
    assert driven.requests["b"].status is RequestStatus.WAITING
    driven.finish()
    for name in "ab":
        driven.assert_right(name)


def test_blocks_of_a_long_prompt_are_dealt_over_the_ring() -> None:
    driven = Driven(ring=4, slots=40, block=4)
    request = driven.add("a", prompt(64))
    driven.step()
    assert request.holders == [0, 1, 2, 3] * 4


def test_output_stays_on_one_home_rank_until_its_share_is_too_large() -> None:
    driven = Driven(ring=2, slots=100, block=4, reserve=8)
    request = driven.add("a", prompt(8), max_tokens=120)
    while len(driven.output["a"]) < 100:
        driven.step()
    ranks = request.holders
    assert len(set(ranks[2:6])) == 1, "short outputs do not wander"
    moves = sum(a != b for a, b in pairwise(ranks[2:]))
    assert moves <= len(ranks) // 4
    assert 0.3 <= ranks.count(0) / len(ranks) <= 0.7


def test_a_dry_pool_parks_the_youngest_which_finishes_later_with_the_same_tokens() -> None:
    driven = Driven(ring=2, slots=6, block=4, reserve=1, chunk=64)
    for name in "ab":
        driven.add(name, prompt(12, seed=ord(name)), max_tokens=30)
    oldest = driven.requests["a"]
    seen: list[RequestStatus] = []
    parked = 0
    while driven.scheduler.has_work:
        before = driven.requests["b"].status
        driven.step()
        parked += before is RequestStatus.RUNNING and driven.requests["b"].status is RequestStatus.WAITING
        seen.append(oldest.status)
    assert parked >= 1
    assert RequestStatus.WAITING not in seen, "the oldest is never parked"
    for name in "ab":
        driven.assert_right(name)
        assert driven.ended[name].finish_reason == "length"


def test_parked_requests_come_back_in_their_order() -> None:
    driven = Driven(ring=1, slots=12, block=4, reserve=1, chunk=64)
    for name in "abcd":
        driven.add(name, prompt(8, seed=ord(name)), max_tokens=28)
    driven.finish()
    ends = list(driven.ended)
    assert ends == sorted(ends)
    for name in "abcd":
        driven.assert_right(name)


@pytest.mark.parametrize("steps", range(6))
def test_cancel_in_every_state(steps: int) -> None:
    """Waiting, half computed, decoding, or parked: its blocks are free and the others go on."""
    driven = Driven(ring=2, slots=8, block=4, chunk=8, reserve=1)
    driven.add("a", prompt(12), max_tokens=16)
    driven.add("b", prompt(20, seed=5), max_tokens=16)
    for _ in range(steps):
        driven.step()
    assert driven.scheduler.cancel("b")
    driven.scheduler.check()
    assert not driven.scheduler.cancel("b")
    assert driven.requests["b"].status is RequestStatus.FINISHED
    driven.finish()
    driven.assert_right("a")
    assert "b" not in driven.ended


def test_cancel_while_the_step_is_on_its_way() -> None:
    driven = Driven()
    driven.add("a", prompt(6))
    driven.add("b", prompt(6, seed=3))
    plan = driven.scheduler.schedule()
    assert driven.scheduler.cancel("a")
    driven.commit(plan)
    assert [u.request_id for u in driven.updates] == ["b"]
    assert driven.step().released == [driven.requests["a"].handle]
    driven.finish()
    driven.assert_right("b")


def test_cancel_what_is_not_known() -> None:
    assert not Driven().scheduler.cancel("nobody")


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    driven = Driven()
    driven.add("a", prompt(3), max_tokens=1)
    with pytest.raises(InvalidValueError, match="'a' is already in use") as refused:
        driven.add("a", prompt(3))
    assert refused.value.param == "request_id"
    driven.finish()
    driven.add("a", prompt(3), max_tokens=1)
    driven.scheduler.cancel("a")
    driven.add("a", prompt(3), max_tokens=1)


def output_with_an_end(length: int = 5) -> tuple[list[int], int]:
    """A prompt whose answer meets the end token, and after how many tokens."""
    for seed in range(500):
        tokens = expected_output(prompt(length, seed), SamplingParams(max_tokens=100))
        if tokens[-1] == END and 3 <= len(tokens) < 20:
            return prompt(length, seed), len(tokens)
    raise AssertionError("no such prompt")


def test_the_end_token_ends_a_request() -> None:
    ids, length = output_with_an_end()
    driven = Driven()
    driven.add("a", ids, max_tokens=100, ignore_eos=False)
    driven.finish()
    end = driven.ended["a"]
    assert (end.finish_reason, end.stop_token_id, len(driven.output["a"])) == ("stop", END, length)
    assert end.usage is not None
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (5, length)


def test_ignore_eos_goes_on_to_the_length() -> None:
    ids, length = output_with_an_end()
    driven = Driven(slots=100)
    driven.add("a", ids, max_tokens=length + 10, ignore_eos=True)
    driven.finish()
    assert driven.ended["a"].finish_reason == "length" and driven.ended["a"].stop_token_id is None
    assert len(driven.output["a"]) == length + 10


def test_min_tokens_come_before_any_end() -> None:
    ids, length = output_with_an_end()
    driven = Driven(slots=100)
    driven.add("a", ids, max_tokens=100, min_tokens=length + 3, ignore_eos=False)
    driven.finish()
    assert len(driven.output["a"]) >= length + 3
    assert END not in driven.output["a"][:length + 3]
    driven.assert_right("a")


def test_stop_tokens_end_a_request_also_without_end_tokens() -> None:
    free = Driven()
    free.add("a", prompt(4), max_tokens=10)
    free.finish()
    stop = free.output["a"][4]
    driven = Driven()
    driven.add("a", prompt(4), max_tokens=10, stop_token_ids=(stop,))
    driven.finish()
    assert driven.output["a"] == free.output["a"][:free.output["a"].index(stop) + 1]
    assert driven.ended["a"].stop_token_id == stop and driven.ended["a"].finish_reason == "stop"


def test_an_end_on_the_last_token_is_a_stop() -> None:
    ids, length = output_with_an_end()
    driven = Driven()
    driven.add("a", ids, max_tokens=length, ignore_eos=False)
    driven.finish()
    assert driven.ended["a"].finish_reason == "stop"


def test_several_tokens_of_one_step_end_where_the_request_ends() -> None:
    """Speculation will return lists: what comes after the end is dropped, logprobs with it."""
    driven = Driven()
    driven.add("a", prompt(4), max_tokens=10, stop_token_ids=(9,), logprobs=0)
    plan = driven.scheduler.schedule()
    driven.ranks.take_in(plan)
    logprobs = [TokenLogprob(token, -1.0, []) for token in (5, 9, 6)]
    [update] = driven.scheduler.update(
        plan, ModelOutput(plan.step, [SampledTokens(driven.requests["a"].handle, [5, 9, 6], logprobs)], []))
    assert update.token_ids == [5, 9] and update.logprobs == logprobs[:2]
    assert update.finish_reason == "stop" and update.usage is not None and update.usage.completion_tokens == 2


def answer(driven: Driven, plan: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
    """Commit a step with these tokens instead of the ranks' own."""
    driven.ranks.take_in(plan)
    handles = {driven.requests[name].handle: ids for name, ids in tokens.items()}
    sampled = [SampledTokens(rows.handle, handles[rows.handle], []) for rows in plan.rows if rows.sample]
    driven.scheduler.update(plan, ModelOutput(plan.step, sampled, []))
    driven.scheduler.check()


def test_decoding_goes_before_an_older_request_that_has_much_to_compute() -> None:
    driven = Driven(chunk=8)
    driven.add("old", prompt(4), max_tokens=60)
    driven.add("young", prompt(4), max_tokens=20)
    answer(driven, driven.scheduler.schedule(), {"old": list(range(1, 20)) * 2, "young": [1]})
    plan = driven.scheduler.schedule()
    assert [tokens_of(plan, driven, name) for name in ("old", "young")] == [7, 1]


def test_an_end_before_min_tokens_does_not_end() -> None:
    driven = Driven()
    request = driven.add("a", prompt(4), max_tokens=10, min_tokens=2, ignore_eos=False)
    for expected in (RequestStatus.RUNNING, RequestStatus.FINISHED):
        answer(driven, driven.scheduler.schedule(), {"a": [END]})
        assert request.status is expected


def test_one_that_was_picked_and_then_parked_for_an_older_is_not_in_the_step() -> None:
    """Several tokens at once can make an older request grow after a younger one was picked."""
    driven = Driven(ring=1, slots=4, block=4, reserve=1)
    driven.add("old", prompt(7), max_tokens=9)
    driven.add("young", prompt(5), max_tokens=5)
    answer(driven, driven.scheduler.schedule(), {"old": [1, 2, 3], "young": [4]})
    plan = driven.scheduler.schedule()
    assert [rows.handle for rows in plan.rows] == [driven.requests["old"].handle]
    assert plan.released == [driven.requests["young"].handle]
    assert driven.requests["young"].status is RequestStatus.WAITING
    answer(driven, plan, {"old": [4]})
    driven.finish()


def test_a_row_without_a_token_ends_that_request_with_an_error_and_no_other() -> None:
    driven = Driven()
    broken = driven.add("broken", prompt(5))
    driven.add("fine", prompt(5))
    driven.ranks.errors[broken.handle] = "logits that are not finite"
    driven.finish()
    assert driven.ended["broken"].finish_reason == "error"
    assert driven.ended["broken"].error == "logits that are not finite"
    assert driven.output["broken"] == []
    driven.assert_right("fine")


def test_progress_is_weighted_by_cost_and_ends_at_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringserve.request.PROGRESS_INTERVAL_S", 0.0)
    driven = Driven(chunk=8)
    driven.add("a", prompt(64), max_tokens=1, return_progress=True)
    seen = []
    while driven.scheduler.has_work:
        driven.step()
        seen += [u.progress for u in driven.updates if u.progress is not None]
    assert [p.processed for p in seen] == [8, 16, 24, 32, 40, 48, 56, 64]
    percents = [p.percent for p in seen]
    assert percents == sorted(percents) and percents[-1] == 100.0
    assert percents[3] < 50, "the second half of a prompt costs more than the first"
    assert all(p.eta_ms is not None and p.total == 64 and p.queue_position == 0 for p in seen)


def test_progress_comes_no_more_often_than_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringserve.request.PROGRESS_INTERVAL_S", 1e9)
    driven = Driven(chunk=8)
    driven.add("a", prompt(64), max_tokens=1, return_progress=True)
    seen = []
    while driven.scheduler.has_work:
        driven.step()
        seen += [u.progress.processed for u in driven.updates if u.progress is not None]
    assert seen == [8, 64], "the beginning and the end of the prefill are always said"


def test_those_who_wait_hear_their_place() -> None:
    driven = Driven(running=1)
    for name in "abc":
        driven.add(name, prompt(8), return_progress=name != "b")
    driven.step()
    [update] = driven.scheduler.waiting_updates()
    assert update.request_id == "c" and update.progress is not None
    assert (update.progress.queue_position, update.progress.processed) == (2, 0)


def test_update_refuses_another_steps_result() -> None:
    driven = Driven()
    driven.add("a", prompt(3))
    plan = driven.scheduler.schedule()
    with pytest.raises(AssertionError):
        driven.scheduler.update(plan, ModelOutput(plan.step + 1, [], []))


def test_a_handle_is_released_once_and_announced_again_when_it_returns() -> None:
    driven = Driven(ring=1, slots=8, block=4, reserve=1, chunk=64)
    for name in "ab":
        driven.add(name, prompt(8, seed=ord(name)), max_tokens=20)
    plans = driven.finish()
    young = driven.requests["b"].handle
    announced = sum(new.handle == young for plan in plans for new in plan.new)
    released = sum(plan.released.count(young) for plan in plans)
    assert announced >= 2 and announced - released <= 1


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, go and are stepped at random; each that is not cancelled gives what it must."""

    @initialize(ring=st.integers(1, 3), slots=st.integers(4, 14), block=st.integers(1, 5),
                chunk=st.integers(4, 24), running=st.integers(1, 4), reserve=st.integers(1, 9),
                groups=st.integers(1, 2), policy=st.sampled_from(sorted(POLICIES)), prefix_cache=st.booleans(),
                width=st.sampled_from([None, 1, 2, 3]), max_step_ms=st.sampled_from([None, 0.5, 2.0, 20.0]))
    def begin(self, groups: int, **options: Any) -> None:
        self.driven = Driven(**options, groups=[layer_group(), layer_group(window=6)][:groups])
        self.cancelled: set[str] = set()

    @rule(length=st.integers(1, 30), seed=st.integers(0, 3), most=st.integers(1, 25),
          least=st.integers(0, 5), ignore_eos=st.booleans(), tenant=st.sampled_from("xy"),
          priority=st.integers(-8, 8), stops=st.sets(st.integers(0, VOCABULARY - 1), max_size=2))
    def add(self, length: int, seed: int, most: int, least: int, ignore_eos: bool, tenant: str, priority: int,
            stops: set[int]) -> None:
        length = min(length, self.driven.capacity - 1)
        most = min(most, self.driven.capacity - length)
        name = f"r{len(self.driven.requests)}"
        self.driven.add(name, prompt(length, seed), max_tokens=most, min_tokens=min(least, most),
                        ignore_eos=ignore_eos, stop_token_ids=tuple(stops),
                        scheduling=SchedulingParams(tenant=tenant, priority=priority))

    @precondition(lambda self: self.driven.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.driven.requests)))
        alive = name not in self.driven.ended and name not in self.cancelled
        assert self.driven.scheduler.cancel(name) == alive
        if name not in self.driven.ended:
            self.cancelled.add(name)
        self.driven.scheduler.check()

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.driven.step()

    @precondition(lambda self: self.driven.requests)
    @rule(data=st.data())
    def cancel_on_the_way(self, data: st.DataObject) -> None:
        plan = self.driven.scheduler.schedule()
        name = data.draw(st.sampled_from(sorted(self.driven.requests)))
        if self.driven.scheduler.cancel(name):
            self.cancelled.add(name)
        self.driven.commit(plan)

    def teardown(self) -> None:
        if hasattr(self, "driven"):
            self.driven.finish()
            for name in self.driven.requests:
                if name not in self.cancelled:
                    self.driven.assert_right(name)
                    assert name in self.driven.ended


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=400, stateful_step_count=25, deadline=None)


@pytest.mark.long
class TestSchedulerAtLength(SchedulerMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=6000, stateful_step_count=60, deadline=None,
                        suppress_health_check=[HealthCheck.too_slow])


def test_plans_hold_ids_as_packed_bytes() -> None:
    driven = Driven()
    driven.add("a", [1, 2, 70000])
    plan = driven.scheduler.schedule()
    assert plan.tokens[0].token_ids == array("I", [1, 2, 70000]).tobytes()
