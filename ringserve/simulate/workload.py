"""Workload: who asks for how much, and when. A pure function of its numbers and a seed."""

import math
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

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
    kind: str
    token_ids: "array[int]"
    output_tokens: int
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)


SHORT_AND_LONG = (Kind(name="short", share=0.95, prompt=(128, 4096), output=(16, 256)),
                  Kind(name="long", share=0.05, prompt=(131_072, 1_048_576), output=(16, 256)))
SHARED_PREFIX = (Kind(name="short", share=0.95, prompt=(1024, 4096), output=(16, 256), shared_prefix=768),
                 Kind(name="long", share=0.05, prompt=(131_072, 1_048_576), output=(16, 256)))
TENANTS = (Kind(name="short", share=0.5, prompt=(128, 4096), output=(16, 256), tenant="few"),
           Kind(name="long", share=0.3, prompt=(131_072, 1_048_576), output=(16, 64), tenant="many"),
           Kind(name="whale", share=0.2, prompt=(131_072, 1_048_576), output=(16, 64), tenant="few"))
WORKLOADS = {"short-and-long": SHORT_AND_LONG, "shared-prefix": SHARED_PREFIX, "tenants": TENANTS}


def arrivals(kinds: tuple[Kind, ...], rate: float, seconds: float, seed: int, burstiness: float = 1.0
             ) -> Iterator[Arrival]:
    """`rate` requests a second for so long. `burstiness` is the squared coefficient of variation of the gaps between
    them: 1 is Poisson, more comes in bursts (gamma)."""
    rng = random.Random(seed)
    now, number = 0.0, 0
    while True:
        now += rng.gammavariate(1 / burstiness, burstiness / rate)
        if now >= seconds:
            return
        number += 1
        kind = rng.choices(kinds, [k.share for k in kinds])[0]
        length = _between(rng, kind.prompt)
        prefix = min(kind.shared_prefix, length)
        # One id for a whole text: what matters is only which texts are equal.
        ids = array("I", [kinds.index(kind) + 1]) * prefix + array("I", [1000 + number]) * (length - prefix)
        yield Arrival(at=now, kind=kind.name, token_ids=ids, output_tokens=_between(rng, kind.output),
                      scheduling=SchedulingParams(tenant=kind.tenant))


def _between(rng: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
