"""Simulation: the server's own scheduler, driven by a discrete-event clock instead of ranks."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ringserve.block_pool import BlockPool
from ringserve.config import SchedulerConfig
from ringserve.cost_model import STEP, TOKEN, CostModel
from ringserve.errors import OverloadedError
from ringserve.outputs import Usage
from ringserve.plan import ModelOutput, SampledTokens
from ringserve.prefix_cache import PrefixCache
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams
from ringserve.scheduler import Scheduler
from ringserve.simulate.hardware import Hardware
from ringserve.simulate.workload import Arrival
from ringserve.updates import RequestUpdate

BLOCK = 64
CHUNK = 65_536
"""Most tokens of a step: memory is no limit here."""
NOISE = 0.05
"""Standard deviation of a step's time, relative."""
PRIOR_ERROR = 1.5
"""By which factor the cost model's start is off, up or down: it has to learn."""


@dataclass(slots=True)
class Outcome:
    """What one request saw. Seconds, from its arrival."""

    kind: str
    tenant: str
    arrival: float
    prompt_tokens: int
    alone_s: float
    """Its prefill alone on the ring, without noise."""
    first_token_s: float | None = None
    end_s: float | None = None
    longest_gap_s: float = 0.0
    cached_tokens: int = 0
    ahead_s: float = 0.0
    """Prefill work that was there when it arrived."""
    refused: bool = False
    etas: list[tuple[float, float, float]] = field(default_factory=list)
    """(seconds, percent, predicted seconds to the first token) of each progress report."""
    last_token: float = 0.0


class Simulation:
    def __init__(self, hardware: Hardware, config: SchedulerConfig, *, seed: int = 0, prefix_cache: bool = True,
                 check: int = 0) -> None:
        """`check`: verify every invariant of the scheduler after every so many steps (slow); 0 never does."""
        self.hardware, self._check = hardware, check
        self._rng = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.busy_s = 0.0
        self._truth = self._model(hardware, 1.0)
        self.cost = self._model(hardware, PRIOR_ERROR)
        self.pool = BlockPool(hardware.ring_size, len(hardware.groups), hardware.slots_per_rank)
        self.cache = PrefixCache(self.pool, BLOCK, self._block_cost, enabled=prefix_cache)
        self.scheduler = Scheduler(config, self.cache, self.cost, clock=lambda: self.now)
        self.outcomes: dict[str, Outcome] = {}

    def _model(self, hardware: Hardware, off: float) -> CostModel:
        def skewed(value: float) -> float:
            return value * math.exp(math.log(off) * self._rng.uniform(-1, 1))

        m = hardware.machine
        machine = replace(m, flops=skewed(m.flops), key_bytes_per_s=skewed(m.key_bytes_per_s),
                          link_bytes_per_s=skewed(m.link_bytes_per_s), step_s=skewed(m.step_s),
                          request_s=skewed(m.request_s), exchange_s=skewed(m.exchange_s))
        model = CostModel(hardware.groups, hardware.linear_flops_per_token, hardware.ring_size, machine)
        model.weights[TOKEN] = skewed(hardware.linear_flops_per_token / hardware.linear_flops)
        return model

    def _block_cost(self, index: int) -> float:
        return self.cost.flops(index * BLOCK, (index + 1) * BLOCK)

    def alone_s(self, tokens: int, width: int | None = None) -> float:
        """Seconds of a prefill alone on the ring."""
        budget = self.scheduler.forecast.budget.step_s
        return self._truth.prefill_seconds(0, tokens, width or self.hardware.ring_size, budget,
                                           self.scheduler.config.max_chunk_tokens, BLOCK)

    def rank_seconds(self, arrival: Arrival) -> float:
        """What a request takes of the ring, as a share of all its ranks: prefill and decode, unshared."""
        tokens, ring = arrival.prompt_tokens, self.hardware.ring_size
        width = 1 if tokens < 8192 else ring
        decode = self._truth.decode_seconds(tokens, width) * arrival.output_tokens
        prefill = self._truth.prefill_seconds(0, tokens, width, math.inf, CHUNK, BLOCK) - self._truth.weights[STEP]
        return (prefill + decode) * width / ring

    def run(self, work: Iterable[Arrival], *, until: float = float("inf")) -> list[Outcome]:
        """Serve all of it to the end (or to the time `until`); outcomes in order of arrival."""
        coming = iter(work)
        upcoming = next(coming, None)
        while upcoming is not None or self.scheduler.has_work:
            if self.now > until:
                break
            if not self.scheduler.has_work and upcoming is not None:
                self.now = max(self.now, upcoming.at)
            while upcoming is not None and upcoming.at <= self.now:
                self.add(upcoming)
                upcoming = next(coming, None)
            if self.scheduler.has_work:
                self.step()
        return list(self.outcomes.values())

    def add(self, arrival: Arrival) -> None:
        number = len(self.outcomes) + 1
        name = f"r{number}"
        tokens = len(arrival.token_ids)
        outcome = self.outcomes[name] = Outcome(
            arrival.kind, arrival.scheduling.tenant, arrival.at, tokens, self.alone_s(tokens),
            ahead_s=self.scheduler.queued_s)
        try:
            self.scheduler.add(Request(
                request_id=name, handle=number, token_ids=arrival.token_ids,
                params=SamplingParams(max_tokens=arrival.output_tokens, temperature=0, ignore_eos=True), seed=0,
                end_token_ids=(), max_total_tokens=tokens + arrival.output_tokens, arrival=arrival.at,
                scheduling=arrival.scheduling, return_progress=outcome.alone_s > 1.0))
        except OverloadedError:
            outcome.refused = True

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.rows, "work, and nothing to do"
        truth = self._truth.weights
        busiest = max(sum(w * x for w, x in zip(truth, row)) for row in self.scheduler.step_cost.ranks)
        seconds = (busiest + truth[STEP]) * max(0.5, self._rng.gauss(1.0, NOISE))
        self.now += seconds
        self.busy_s += seconds
        self.steps += 1
        sampled = [SampledTokens(rows.handle, [1], []) for rows in plan.rows if rows.sample]
        for update in self.scheduler.update(plan, ModelOutput(plan.step, sampled, [])):
            self._note(update)
        if self._check and self.steps % self._check == 0:
            self.scheduler.check()

    def _note(self, update: RequestUpdate) -> None:
        outcome = self.outcomes[update.request_id]
        since = self.now - outcome.arrival
        if update.progress is not None and update.progress.eta_ms is not None and not update.token_ids:
            outcome.etas.append((since, update.progress.percent, update.progress.eta_ms / 1000))
        if not update.token_ids:
            return
        if outcome.first_token_s is None:
            outcome.first_token_s = since
            outcome.cached_tokens = update.cached_tokens
        else:
            outcome.longest_gap_s = max(outcome.longest_gap_s, self.now - outcome.last_token)
        outcome.last_token = self.now
        if isinstance(update.usage, Usage):
            outcome.end_s = since
