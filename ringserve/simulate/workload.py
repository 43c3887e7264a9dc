"""Workload: who asks for how much, and when. A pure function of its numbers and a seed."""

import math
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from ringserve.scheduling_params import SchedulingParams


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests of one sort. Lengths are drawn between two bounds, evenly on a logarithmic scale."""

    name: str
    share: float
    """Of the requests."""
    prompt: tuple[int, int]
    output: tuple[int, int]
    tenant: str = ""
    shared_prefix: int = 0
    """Tokens that all prompts of this kind begin with."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    at: float
    number: int
    kind: str
    prompt_tokens: int
    output_tokens: int
    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    """Made when it is served: a million of them are not kept for all."""
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)


SHORT_AND_LONG = (Kind(name="short", share=0.95, prompt=(128, 4096), output=(16, 256)),
                  Kind(name="long", share=0.05, prompt=(131_072, 1_048_576), output=(16, 256)))
SHARED_PREFIX = (Kind(name="short", share=0.95, prompt=(1024, 4096), output=(16, 256), shared_prefix=768),
                 Kind(name="long", share=0.05, prompt=(131_072, 1_048_576), output=(16, 256)))
TENANTS = (Kind(name="short", share=0.5, prompt=(128, 4096), output=(16, 256), tenant="few"),
           Kind(name="long", share=0.3, prompt=(131_072, 1_048_576), output=(16, 64), tenant="many"),
           Kind(name="whale", share=0.2, prompt=(131_072, 1_048_576), output=(16, 64), tenant="few"))
WORKLOADS = {"short-and-long": SHORT_AND_LONG, "shared-prefix": SHARED_PREFIX, "tenants": TENANTS}


def arrivals(kinds: tuple[Kind, ...], work_s: float, seconds: float, seed: int, cost: Callable[[Arrival], float],
             burstiness: float = 1.0) -> Iterator[Arrival]:
    """Requests whose costs add up to `work_s`, over so many seconds: so the load is what it is said to be, and not what
    the few largest happen to make of it. `burstiness` is the squared coefficient of variation of the gaps between
    arrivals: 1 is Poisson, more comes in bursts (gamma)."""
    drawn: list[Arrival] = []
    rng = random.Random(seed)
    now = spent = 0.0
    while spent < work_s:
        now += rng.gammavariate(1 / burstiness, burstiness)
        drawn.append(_draw(kinds, now, len(drawn) + 1, rng))
        spent += cost(drawn[-1])
    for arrival in drawn:
        yield replace(arrival, at=arrival.at * seconds / now, token_ids=_text(arrival, kinds))


def _draw(kinds: tuple[Kind, ...], at: float, number: int, rng: random.Random) -> Arrival:
    kind = rng.choices(kinds, [k.share for k in kinds])[0]
    return Arrival(at=at, number=number, kind=kind.name, prompt_tokens=_between(rng, kind.prompt),
                   output_tokens=_between(rng, kind.output), scheduling=SchedulingParams(tenant=kind.tenant))


def _text(arrival: Arrival, kinds: tuple[Kind, ...]) -> "array[int]":
    """One id for a whole text: what matters is only which texts are equal."""
    place = next(i for i, kind in enumerate(kinds) if kind.name == arrival.kind)
    prefix = min(kinds[place].shared_prefix, arrival.prompt_tokens)
    return array("I", [place + 1]) * prefix + array("I", [1000 + arrival.number]) * (arrival.prompt_tokens - prefix)


def _between(rng: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
