"""Packing: what one step computes of which request, by predicted seconds."""

from collections.abc import Callable, Iterable, Sequence

from ringserve.cost_model import STEP, StepCost
from ringserve.fit import Vector
from ringserve.forecast import Forecast
from ringserve.policy import Key
from ringserve.request import Request, RequestStatus
from ringserve.tenants import Tenants

RIDE_SHARE = 0.5
"""Of a step's time and tokens, for short prefills beside others, whatever the policy says: they need not wait until
they are late."""
LEAST_SHARE = 0.25
"""Of the budget, that one prefill gets in each step even when decoding alone fills it."""
GUESSES = 4
SAFETY = 0.97

Spans = list[tuple[int, int]]
"""Tokens [start, stop) of a request, in position order."""


class Packing:
    """One step, filled request by request. `make_room(request, until)` finds blocks for the tokens before `until`, or
    says that the request cannot have them in this step."""

    def __init__(self, forecast: Forecast, tenants: Tenants, ring_size: int, block_size: int, now: float,
                 make_room: Callable[[Request, int], bool]) -> None:
        self.cost = StepCost(forecast.cost)
        self.picked: list[tuple[Request, Spans]] = []
        self._forecast, self._model, self._tenants = forecast, forecast.cost, tenants
        self._ring_size, self._block_size, self._now = ring_size, block_size, now
        self._make_room = make_room

    def add_decodes(self, decoding: Iterable[Request]) -> None:
        """One token of each."""
        size = self._block_size
        for request in decoding:
            if request.status is not RequestStatus.RUNNING:
                continue
            known = len(request.token_ids)
            if known > len(request.blocks) * size and not self._make_room(request, known):
                continue
            if request.decode_work is None:
                tokens = [0] * self._ring_size
                tokens[request.holders[-1]] = 1
                request.decode_work = self._model.work(known - 1, tokens, request.keys_on)
            self.cost.add(request.decode_work)
            self.picked.append((request, [(known - 1, known)]))
        if self._tenants.several and self.picked:
            share = (self.cost.seconds() - self._model.weights[STEP]) / len(self.picked)
            for request, _ in self.picked:
                self._tenants.charge(request.scheduling.tenant, share)

    def add_prefills(self, prefills: Sequence[Request], most: int, budget_s: float) -> None:
        """Slices of prefills, at most `most` tokens: short ones in their share of the step, then the others in the
        order of the policy, then what is left for short ones."""
        base, taken = self.cost.seconds(), 0
        riders = [r for r in prefills if self._forecast.rides(r)]
        share = RIDE_SHARE if len(riders) < len(prefills) else 1.0
        ride_until = base + share * max(budget_s - base, LEAST_SHARE * budget_s)
        done: set[Request] = set()
        for request in sorted(riders, key=lambda r: (self._served(r), r.deadline, r.handle)):
            if used := self._add_slice(request, int(most * share) - taken, ride_until):
                taken += used
                done.add(request)
        for request in sorted(prefills, key=self._turn):
            if taken >= most:
                break
            if request in done:
                continue
            if taken:
                taken += self._add_slice(request, most - taken, budget_s)
            else:
                # Whoever is first gets something, whatever it costs: nobody starves.
                limit_s = max(budget_s, base + LEAST_SHARE * budget_s)
                taken += self._add_slice(request, most, limit_s, least=self._block_size)

    def _served(self, request: Request) -> float:
        return self._tenants.served(request.scheduling.tenant)

    def _turn(self, request: Request) -> Key:
        # Those who ride have their half of the step; the rest is for the others first, or a stream of short ones
        # would leave nothing for a long one.
        return (self._forecast.rides(request), self._served(request), *self._forecast.urgency(request, self._now),
                request.handle)

    def _add_slice(self, request: Request, most: int, limit_s: float, least: int = 0) -> int:
        """Give a prefill as many tokens as fit the step's time limit, at least `least`; how many it was given."""
        before = self.cost.seconds()
        spare_s = limit_s - before
        if most <= 0 or (spare_s <= 0 and not least) or request.status is not RequestStatus.RUNNING:
            return 0
        # A first guess by the formula for one request alone; then the step as it is.
        guess = self._model.chunk_tokens(request.done, len(request.ranks), spare_s + self._model.weights[STEP],
                                         min(most, request.num_missing), self._block_size)
        spans = self._fitting(request, request.missing(self._block_size, guess), before, max(spare_s, 0.0), least)
        if not spans or not self._make_room(request, spans[-1][1]):
            return 0
        self.cost.add(self._work(request, spans))
        self.picked.append((request, spans))
        self._tenants.charge(request.scheduling.tenant, self.cost.seconds() - before)
        return count_tokens(spans)

    def _fitting(self, request: Request, spans: Spans, before: float, spare_s: float, least: int) -> Spans:
        """The first of these tokens, as many as add no more than `spare_s` to the step, or else `least`."""
        for _ in range(GUESSES):
            if not spans:
                return []
            added_s = self.cost.seconds(self._work(request, spans)) - before
            if added_s <= spare_s:
                return spans
            count = count_tokens(spans)
            fewer = max(self._whole_blocks(spans, int(count * SAFETY * spare_s / added_s)), least)
            if fewer >= count:
                return spans
            spans = _first(spans, fewer)
        return spans if least else []

    def _whole_blocks(self, spans: Spans, count: int) -> int:
        """Of more than a block take whole ones, so that chunks end where ranks change."""
        if count > self._block_size and len(spans) == 1:
            count -= (spans[0][0] + count) % self._block_size
        return count

    def _work(self, request: Request, spans: Spans) -> list[tuple[int, Vector]]:
        size, holders = self._block_size, request.holders
        tokens = [0] * self._ring_size
        for start, stop in spans:
            while start < stop:
                number = start // size
                until = min(stop, (number + 1) * size)
                tokens[holders[number] if number < len(holders) else request.ranks[-1]] += until - start
                start = until
        return self._model.work(spans[0][0], tokens, request.keys_on)


def count_tokens(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _first(spans: Spans, count: int) -> Spans:
    """The first `count` tokens of these spans."""
    taken: Spans = []
    for start, stop in spans:
        if count <= 0:
            break
        taken.append((start, min(stop, start + count)))
        count -= stop - start
    return taken
