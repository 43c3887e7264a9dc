"""Report: what the requests of a simulation saw, as numbers, a table and a chart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ringserve.simulate.simulation import Outcome, Simulation

SHORT_DEADLINE_S = 1.0
ETA_FROM_PERCENT = 10.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    policy: str
    load: float
    utilisation: float
    """Share of the time in which a step ran."""
    shorts: int
    longs: int
    missed: float
    """Share of the short requests without a first token within a second."""
    short_p50_s: float
    short_p99_s: float
    gap_p99_s: float
    """Of the longest gap between two tokens of each request."""
    long_p50: float
    """Time to first token of the long requests over their time alone."""
    long_worst: float
    long_worst_with_queue: float
    """Over its time alone and the work that was there when it arrived."""
    eta_p50: float
    """Relative error of the predicted time to first token, from a tenth of the prefill on."""
    eta_p90: float
    cached: float
    """Share of the prompt tokens that were not computed."""
    step_error_p50: float
    refused: int
    parked: int
    steps: int
    seconds: float


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


def summarize(simulation: Simulation, policy: str, load: float) -> Summary:
    outcomes = [o for o in simulation.outcomes.values() if o.first_token_s is not None]
    shorts = [o for o in outcomes if o.kind == "short"]
    longs = [o for o in outcomes if o.kind != "short"]
    first = [o.first_token_s or 0.0 for o in shorts]
    etas = [error for o in longs for error in eta_errors(o)]
    slow = [(o.first_token_s or 0.0) / o.alone_s for o in longs]
    beyond = [(o.first_token_s or 0.0) / (o.alone_s + o.ahead_s) for o in longs]
    prompt = sum(o.prompt_tokens for o in outcomes)
    return Summary(
        policy=policy, load=load, utilisation=simulation.busy_s / max(simulation.now, 1e-9), shorts=len(shorts),
        longs=len(longs), missed=sum(s > SHORT_DEADLINE_S for s in first) / max(1, len(first)),
        short_p50_s=quantile(first, 0.5), short_p99_s=quantile(first, 0.99),
        gap_p99_s=quantile([o.longest_gap_s for o in outcomes], 0.99), long_p50=quantile(slow, 0.5),
        long_worst=max(slow, default=float("nan")), long_worst_with_queue=max(beyond, default=float("nan")),
        eta_p50=quantile(etas, 0.5), eta_p90=quantile(etas, 0.9),
        cached=sum(o.cached_tokens for o in outcomes) / max(1, prompt),
        step_error_p50=simulation.cost.errors.quantile(0.5) or 0.0,
        refused=sum(o.refused for o in simulation.outcomes.values()), parked=simulation.scheduler.parked,
        steps=simulation.steps, seconds=simulation.now)


def eta_errors(outcome: Outcome) -> list[float]:
    """|predicted - true| / true remaining time to the first token, of each progress report after the first tenth."""
    assert outcome.first_token_s is not None
    return [abs(eta - (outcome.first_token_s - since)) / max(outcome.first_token_s - since, 1e-3)
            for since, percent, eta in outcome.etas if percent >= ETA_FROM_PERCENT]


COLUMNS = ("policy", "load", "busy", "short/long", "short miss 1 s", "short p50", "short p99", "gap p99", "long p50",
           "long worst", "worst / alone + queue", "ETA p50/p90", "cached")


def row(s: Summary) -> tuple[str, ...]:
    return (s.policy, f"{s.load:g}", f"{s.utilisation:.0%}", f"{s.shorts}/{s.longs}", f"{s.missed:.2%}",
            f"{s.short_p50_s * 1000:.0f} ms", f"{s.short_p99_s * 1000:.0f} ms", f"{s.gap_p99_s * 1000:.0f} ms",
            f"{s.long_p50:.2f}x", f"{s.long_worst:.2f}x", f"{s.long_worst_with_queue:.2f}x",
            f"{s.eta_p50:.0%}/{s.eta_p90:.0%}", f"{s.cached:.0%}")


def table(summaries: Sequence[Summary]) -> str:
    """Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *map(row, summaries)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chart(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Time to first token of short requests, and slowdown of long ones, against the load, per policy; PNG or SVG by the
    file's name. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ringserve"
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    markers = "osD^v<>"
    for number, policy in enumerate(dict.fromkeys(s.policy for s in summaries)):
        mine = sorted((s for s in summaries if s.policy == policy), key=lambda s: s.load)
        loads, marker = [s.load for s in mine], markers[number % len(markers)]
        left.plot(loads, [s.short_p99_s for s in mine], marker=marker, label=policy)
        right.plot(loads, [s.long_p50 for s in mine], marker=marker, label=policy)
    left.axhline(SHORT_DEADLINE_S, color="gray", linestyle=":", label="deadline")
    left.set(title="short requests: p99 time to first token", xlabel="load", ylabel="seconds", yscale="log")
    right.set(title="long requests: median slowdown", xlabel="load", ylabel="time to first token / alone")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    plt.close(figure)
