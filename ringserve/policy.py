"""Policies: in which order prefills get the time of a step. Pure functions; compared in `docs/scheduling.md`."""

from collections.abc import Callable
from dataclasses import dataclass

from ringserve.config import PolicyName

FLOOR_STEPS = 3
"""A short request that would miss its deadline within about so many steps goes first."""
SHORT_STEPS = 4
"""A request whose whole prefill fits so many steps is short."""
AGEING = 3.0
"""How fast waiting makes a request more urgent under `srpt`: after its own cost it counts as a quarter of its size."""


@dataclass(slots=True)
class Prospect:
    """One prefill as a policy sees it, in seconds."""

    arrival: float
    deadline: float
    """When its first token is wanted."""
    total_s: float
    """Its whole prefill, alone."""
    remaining_s: float
    leniency: float = 1.0
    """Its wish for the first token over the default one: 2 ** priority."""


Key = tuple[float, ...]
Policy = Callable[[Prospect, float, float], Key]
"""(prospect, now, seconds of a step) -> sort key, smallest first."""


def _fcfs(p: Prospect, now: float, step_s: float) -> Key:
    return (p.arrival,)


def _edf(p: Prospect, now: float, step_s: float) -> Key:
    return (p.deadline, p.arrival)


def _slack(p: Prospect, now: float, step_s: float) -> Key:
    """Slack relative to the whole cost (LARS: Medha, 2409.17264): a long prompt is as late as a short one when it is
    late by the same share of its own time, so neither starves the other."""
    return ((p.deadline - now - p.remaining_s) / p.total_s, p.arrival)


def _slack_floor(p: Prospect, now: float, step_s: float) -> Key:
    """Relative slack alone lets a long prompt run until short ones have no slack left; a floor in absolute terms
    takes those first while they can still make it."""
    slack = p.deadline - now - p.remaining_s
    hurries = p.total_s <= SHORT_STEPS * step_s and slack < FLOOR_STEPS * step_s
    if hurries or slack < -p.total_s:  # late by its own time, whatever its length: so that a long one's turn comes
        return (0.0, p.deadline)
    return (1.0, slack / p.total_s, p.arrival)


def _srpt(p: Prospect, now: float, step_s: float) -> Key:
    """Shortest remaining time, shrunk by waiting so that a long prompt's turn comes, and by a shorter wish."""
    return (p.leniency * p.remaining_s / (1 + AGEING * max(0.0, now - p.arrival) / p.total_s), p.arrival)


POLICIES: dict[PolicyName, Policy] = {
    "fcfs": _fcfs, "edf": _edf, "slack": _slack, "slack-floor": _slack_floor, "srpt": _srpt}
