"""Forecast: what is known of the future of requests: what is left of each, who is next, when its first token comes.

It keeps no requests: whoever asks says which ones there are.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ringserve.config import SchedulerConfig
from ringserve.cost_model import REQUEST, CostModel
from ringserve.policy import POLICIES, SHORT_STEPS, Key, Prospect
from ringserve.request import Request, RequestStatus
from ringserve.tenants import Tenants

DEADLINE_BASE_S, DEADLINE_STRETCH = 1.0, 3.0
"""The default wish for a first token: a second, and three times the prefill's own time."""
PACE_MEMORY_S = 5.0
GOOD_S, GOOD_EACH_S = 0.25, 0.02
"""First tokens are predicted for so long, and longer by this for each prefill among them: it costs more."""
SLICES = 64


@dataclass(slots=True)
class StepBudget:
    """Most seconds that a step should last. The engine sets it when the operator did not."""

    step_s: float
    alone_s: float
    """The same while one request has been alone for a while: larger steps waste less."""


class Forecast:
    """The cost model's numbers, applied to requests under the present policy, budget and pace."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, tenants: Tenants, block_size: int) -> None:
        self._config, self.cost, self._tenants, self._block_size = config, cost, tenants, block_size
        step_s = math.inf if config.max_step_ms is None else config.max_step_ms / 1000
        self.budget = StepBudget(step_s, step_s)
        self._policy = POLICIES[config.policy]
        self._pace = 1.0
        """Predicted seconds of prefill work that are done in a second."""
        self._first_tokens: dict[int, float] = {}
        self._good_until = -math.inf

    # One request

    def weigh(self, request: Request, cached: int, width: int) -> None:
        """Set what its prefill costs on so many ranks when its first `cached` tokens need not be computed."""
        seconds = self.cost.prefill_seconds(cached, request.prompt_tokens, width, self.budget.step_s,
                                            self._config.max_chunk_tokens, self._block_size)
        request.total_s = max(seconds, 1e-6)

    def set_deadline(self, request: Request) -> None:
        """By its own wish, or in proportion to its cost."""
        default = DEADLINE_BASE_S + DEADLINE_STRETCH * request.total_s
        wish = request.scheduling.deadline_s or default * 2.0 ** request.scheduling.priority
        request.deadline, request.leniency = request.arrival + wish, wish / default

    def remaining_s(self, request: Request) -> float:
        """Predicted seconds of the rest of its prefill, alone."""
        if request.output_tokens:
            return 0.0
        if request.status is RequestStatus.WAITING:
            return request.total_s
        whole = self.cost.flops(request.first_cached, request.prompt_tokens)
        left = self.cost.flops(min(request.done, request.prompt_tokens), request.prompt_tokens)
        return request.total_s * left / whole if whole > 0 else 0.0

    def gained_s(self, request: Request, spans: Iterable[tuple[int, int]]) -> float:
        """By how much these tokens shorten the rest of its prefill."""
        whole = self.cost.flops(request.first_cached, request.prompt_tokens)
        return sum(self.cost.flops(*span) for span in spans) / whole * request.total_s if whole > 0 else 0.0

    def percent(self, request: Request) -> float:
        """Of its prefill's cost."""
        whole = self.cost.flops(0, request.prompt_tokens)
        done = self.cost.flops(0, min(request.done, request.prompt_tokens))
        return 100.0 * done / whole if whole else 100.0

    def slack_s(self, request: Request, now: float) -> float:
        return request.deadline - now - self.remaining_s(request)

    def urgency(self, request: Request, now: float) -> Key:
        """Its place in the order of the policy, smallest first."""
        return self._policy(_prospect(request, self.remaining_s(request)), now, self.budget.step_s)

    def rides(self, request: Request) -> bool:
        """Whether a prefill is short enough to be served beside the others."""
        return self._config.ride_along and request.total_s <= SHORT_STEPS * self.budget.step_s

    # Many

    def work_s(self, requests: Iterable[Request], short_only: bool = False) -> float:
        """Predicted seconds of all their prefill work; of the short ones alone, if so asked."""
        return sum(self.remaining_s(r) for r in requests if not short_only or self.rides(r))

    def beside_s(self, own_s: float, others: Iterable[Request]) -> float:
        """Seconds that others take while `own_s` of work is done: each as much, or what it still has to do if that is
        less (processor sharing)."""
        return sum(min(self.remaining_s(r), own_s) for r in others)

    def loads(self, running: Iterable[Request], ring_size: int) -> list[float]:
        """[ranks] predicted seconds of the work that each rank has."""
        loads = [0.0] * ring_size
        for request in running:
            seconds = self.remaining_s(request) + self.cost.weights[REQUEST]
            for rank in request.ranks:
                loads[rank] += seconds / len(request.ranks)
        return loads

    def measure_pace(self, gained_s: float, seconds: float) -> None:
        """A step of so many seconds has brought all prefills together so many predicted seconds on."""
        weight = 1 - math.exp(-seconds / PACE_MEMORY_S)
        self._pace += weight * (gained_s / seconds - self._pace)

    def first_tokens(self, requests: Iterable[Request], now: float) -> dict[int, float]:
        """When each prefill will have its first token, by handle: the policy played forward in coarse slices at the
        present pace. Nobody knows who will come; that short ones come is in the pace."""
        if now < self._good_until:
            return self._first_tokens
        left = {r.handle: (r, self.remaining_s(r)) for r in requests if not r.output_tokens}
        self._good_until = now + GOOD_S + GOOD_EACH_S * len(left)
        step_s = self.budget.step_s
        total = sum(seconds for _, seconds in left.values())
        slice_s = max(step_s if math.isfinite(step_s) else 0.0, total / SLICES, 1e-6)
        pace = min(max(self._pace, 0.05), 2.0)
        then, first_tokens = now, {}
        served = {r.scheduling.tenant: self._tenants.served(r.scheduling.tenant) for r, _ in left.values()}
        while left:
            def key(entry: tuple[Request, float], then: float = then) -> Key:
                request, seconds = entry
                return (served[request.scheduling.tenant], *self._policy(_prospect(request, seconds), then, step_s))

            request, seconds = min(left.values(), key=key)
            worked = min(slice_s, seconds)
            then += worked / pace
            served[request.scheduling.tenant] += worked
            if seconds - worked <= 1e-9:
                first_tokens[request.handle] = then
                del left[request.handle]
            else:
                left[request.handle] = (request, seconds - worked)
        self._first_tokens = first_tokens
        return first_tokens


def _prospect(request: Request, remaining_s: float) -> Prospect:
    return Prospect(request.arrival, request.deadline, max(request.total_s, 1e-6), remaining_s, request.leniency)
