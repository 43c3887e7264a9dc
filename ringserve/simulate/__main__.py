"""`python -m ringserve.simulate`: policies against loads, as a table and a chart."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ringserve.config import PolicyName, SchedulerConfig
from ringserve.errors import ConfigError
from ringserve.policy import POLICIES
from ringserve.simulate.hardware import HARDWARE
from ringserve.simulate.report import Summary, chart, row, summarize, table
from ringserve.simulate.simulation import CHUNK, Simulation
from ringserve.simulate.workload import WORKLOADS, arrivals


@dataclass(frozen=True, kw_only=True)
class Simulate:
    hardware: Literal["8b-8xh200", "needle-2-cores"] = "8b-8xh200"
    """What steps cost: see ringserve/simulate/hardware.py."""

    workload: Literal["short-and-long", "shared-prefix", "tenants"] = "short-and-long"
    """Who asks for what: see ringserve/simulate/workload.py."""

    policies: tuple[PolicyName, ...] = tuple(POLICIES)
    """Orders to compare."""

    loads: tuple[float, ...] = (0.8, 1.0, 1.2)
    """Work that arrives, as a share of what the ring can do."""

    seconds: float = 3600.0
    """Simulated time in which requests arrive."""

    max_step_ms: float = 100.0
    """Budget of a step."""

    burstiness: float = 1.0
    """Squared coefficient of variation of the gaps between arrivals: 1 is Poisson."""

    seed: int = 0

    max_queue_s: float | None = None
    """Refuse requests when this much work is queued."""

    ride_along: bool = True
    """Short prefills share each step. Without, the policy alone decides."""

    chart: Path | None = None
    """Write a chart here (.png or .svg)."""

    check: int = 0
    """Verify every invariant of the scheduler after every so many steps."""


def simulate(wanted: Simulate, policy: PolicyName, load: float) -> Summary:
    """One run. Raises ConfigError for values that cannot work."""
    if not (load > 0 and wanted.seconds > 0 and wanted.burstiness > 0):
        raise ConfigError("loads, seconds and burstiness must be positive")
    config = SchedulerConfig(policy=policy, max_step_ms=wanted.max_step_ms, max_chunk_tokens=CHUNK,
                             max_waiting_requests=1_000_000, max_queue_s=wanted.max_queue_s,
                             ride_along=wanted.ride_along)
    simulation = Simulation(HARDWARE[wanted.hardware](), config, seed=wanted.seed, check=wanted.check)
    kinds = WORKLOADS[wanted.workload]
    simulation.run(arrivals(kinds, load * wanted.seconds, wanted.seconds, wanted.seed, simulation.rank_seconds,
                            wanted.burstiness))
    return summarize(simulation, policy, load)


def main() -> None:
    wanted = tyro.cli(Simulate, description=__doc__)
    summaries = []
    print(f"{wanted.hardware}, {wanted.workload}, {wanted.seconds:g} s, seed {wanted.seed}, steps of "
          f"{wanted.max_step_ms:g} ms")
    for policy in wanted.policies:
        for load in wanted.loads:
            started = time.perf_counter()
            summaries.append(simulate(wanted, policy, load))
            took = time.perf_counter() - started
            print("  ".join(row(summaries[-1])), f" ({summaries[-1].steps:,} steps in {took:.1f} s)", flush=True)
    print()
    print(table(summaries))
    if wanted.chart is not None:
        wanted.chart.parent.mkdir(parents=True, exist_ok=True)
        chart(summaries, wanted.chart, f"{wanted.hardware}, {wanted.workload}")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"ringserve.simulate: {error.message}") from None
