"""The server's scheduler on a simulated clock: everybody is served, nothing leaks, and a seed decides everything."""

import math
import subprocess
import sys
from array import array
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringserve.config import PolicyName, SchedulerConfig
from ringserve.cost_model import FLOP, STEP, TOKEN
from ringserve.policy import POLICIES
from ringserve.scheduling_params import SchedulingParams
from ringserve.simulate.__main__ import Simulate, simulate
from ringserve.simulate.hardware import HARDWARE
from ringserve.simulate.report import chart, summarize, table
from ringserve.simulate.simulation import CHUNK, Simulation
from ringserve.simulate.workload import SHARED_PREFIX, SHORT_AND_LONG, WORKLOADS, Arrival, arrivals


def make(policy: PolicyName = "slack-floor", *, seed: int = 0, check: int = 0, hardware: str = "8b-8xh200",
         **options: object) -> Simulation:
    config = SchedulerConfig(**{"max_step_ms": 100.0, "policy": policy, "max_chunk_tokens": CHUNK,  # type: ignore[arg-type]
                                "max_waiting_requests": 100_000, **options})
    return Simulation(HARDWARE[hardware](), config, seed=seed, check=check)


def arrival(number: int, tokens: int, at: float = 0.0, output: int = 8, tenant: str = "") -> Arrival:
    return Arrival(at=at, number=number, kind="short" if tokens < 8192 else "long", prompt_tokens=tokens,
                   output_tokens=output, token_ids=array("I", [number]) * tokens,
                   scheduling=SchedulingParams(tenant=tenant))


@given(policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 10**6), load=st.floats(0.3, 1.5),
       burstiness=st.floats(0.5, 8.0), workload=st.sampled_from(sorted(WORKLOADS)), step_ms=st.floats(20.0, 500.0),
       ride_along=st.booleans())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_everybody_is_served_and_nothing_leaks(policy: PolicyName, seed: int, load: float, burstiness: float,
                                               workload: str, step_ms: float, ride_along: bool) -> None:
    simulation = make(policy, seed=seed, check=25, max_step_ms=step_ms, ride_along=ride_along)
    outcomes = simulation.run(arrivals(WORKLOADS[workload], load * 2, 2.0, seed, simulation.rank_seconds, burstiness))
    assert outcomes and all(o.end_s is not None and o.first_token_s is not None for o in outcomes)
    simulation.cache.clear()
    assert all(simulation.cache.room_on(rank) == simulation.pool.slots_per_rank
               for rank in range(simulation.pool.ring_size))


def test_a_seed_decides_everything() -> None:
    def run(seed: int) -> list[dict[str, object]]:
        simulation = make(seed=seed)
        return [asdict(o) for o in simulation.run(
            arrivals(SHORT_AND_LONG, 4.0, 4.0, seed, simulation.rank_seconds))]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_load_is_what_it_is_said_to_be() -> None:
    simulation = make()
    drawn = list(arrivals(SHORT_AND_LONG, 100.0, 200.0, 3, simulation.rank_seconds))
    total = sum(map(simulation.rank_seconds, drawn))
    largest = max(map(simulation.rank_seconds, drawn))
    assert 100.0 <= total <= 100.0 + largest
    assert 0 < drawn[0].at <= drawn[-1].at == pytest.approx(200.0)
    assert all(a.at <= b.at for a, b in zip(drawn, drawn[1:]))  # noqa: RUF007


def test_the_cost_model_learns_what_steps_cost() -> None:
    simulation = make(seed=4)
    off = [abs(simulation.cost.weights[i] / simulation._truth.weights[i] - 1) for i in (STEP, TOKEN, FLOP)]
    simulation.run(arrivals(SHORT_AND_LONG, 20.0, 20.0, 4, simulation.rank_seconds))
    learned = [abs(simulation.cost.weights[i] / simulation._truth.weights[i] - 1) for i in (STEP, TOKEN, FLOP)]
    assert max(learned) < 0.25 and sum(learned) < sum(off)
    error = simulation.cost.errors.quantile(0.5)
    assert error is not None and error < 0.08


@pytest.mark.parametrize("policy", ["slack", "slack-floor", "srpt", "edf"])
def test_a_long_prompt_is_not_starved_by_short_ones(policy: PolicyName) -> None:
    """Short requests take a third of the ring for as long as it takes; the long one still comes through."""
    simulation = make(policy)
    one = simulation.rank_seconds(arrival(0, 4096))
    gap = one / 0.33
    alone = simulation.alone_s(200_000)
    shorts = [arrival(2 + i, 4096, at=i * gap) for i in range(int(6 * alone / gap))]
    outcomes = simulation.run([arrival(1, 200_000), *shorts])
    long = outcomes[0]
    bound = 4 if "slack" in policy else 8  # the others let every short one pass
    assert long.first_token_s is not None and long.first_token_s < bound * alone


def test_short_requests_do_not_wait_behind_a_long_one() -> None:
    simulation = make()
    outcomes = simulation.run([arrival(1, 1_000_000), *(arrival(2 + i, 512, at=1.0 + i) for i in range(20))])
    assert all(o.first_token_s is not None and o.first_token_s < 0.3 for o in outcomes[1:])
    long = outcomes[0]
    assert long.first_token_s is not None and long.first_token_s < 1.15 * long.alone_s


def test_ten_long_prompts_of_one_tenant_delay_anothers_by_a_bounded_amount() -> None:
    simulation = make()
    alone = simulation.alone_s(262_144)
    many = [arrival(1 + i, 262_144, tenant="many") for i in range(10)]
    outcomes = simulation.run([*many, arrival(20, 262_144, at=0.2, tenant="few")])
    few = outcomes[-1]
    # Half of the ring until it is done.
    assert few.first_token_s is not None and few.first_token_s < 2 * alone * 1.1 + 1.0


def test_a_shared_prefix_is_computed_once_and_makes_no_chat_wide() -> None:
    simulation = make()
    simulation.run(arrivals(SHARED_PREFIX, 5.0, 10.0, 1, simulation.rank_seconds))
    shorts = [o for o in simulation.outcomes.values() if o.kind == "short"]
    hits = [o for o in shorts if o.cached_tokens == 768]
    assert len(hits) > 0.9 * len(shorts)
    assert all(o.first_token_s is not None and o.first_token_s < 1.0 for o in shorts)


def test_what_exceeds_the_queue_is_refused_with_an_honest_wait() -> None:
    simulation = make(max_queue_s=30.0)
    outcomes = simulation.run([arrival(1 + i, 500_000) for i in range(10)])
    assert any(o.refused for o in outcomes) and not outcomes[0].refused
    assert simulation.scheduler.refused == sum(o.refused for o in outcomes)


def test_a_queue_of_long_prompts_refuses_no_short_one() -> None:
    simulation = make(max_queue_s=30.0)
    outcomes = simulation.run([*(arrival(1 + i, 500_000) for i in range(4)), arrival(9, 512, at=0.5)])
    assert any(o.refused for o in outcomes[:4]) and not outcomes[-1].refused


def test_the_report_and_the_chart(tmp_path: Path) -> None:
    summaries = [simulate(Simulate(seconds=3.0), policy, load) for policy in ("edf", "fcfs")  # type: ignore[arg-type]
                 for load in (0.5, 1.0)]
    assert all(math.isfinite(s.short_p99_s) and s.shorts > 0 for s in summaries)
    assert table(summaries).count("\n") == 5
    for name in ("chart.png", "chart.svg"):
        chart(summaries, tmp_path / name, "title")
        assert (tmp_path / name).stat().st_size > 10_000


def test_no_short_request_is_no_crash() -> None:
    simulation = make()
    simulation.run([arrival(1, 200_000)])
    assert summarize(simulation, "edf", 1.0).longs == 1


def test_the_command_says_what_is_wrong() -> None:
    result = subprocess.run([sys.executable, "-m", "ringserve.simulate", "--seconds", "-1"], capture_output=True,
                            text=True, timeout=60)
    assert result.returncode == 1
    assert "must be positive" in result.stderr and "Traceback" not in result.stderr
