"""Scheduler: picks, in position order, the missing tokens to compute next. No torch, no processes.

There is no prefill phase and no decode phase: a prompt is many missing tokens, a decoding request one. A step is packed
to last no longer than its budget:

    1. one token of every decoding request
    2. short prefills, several of them, inside the ride-along share of the budget
    3. slices of the other prefills, in the order of the policy, as large as the rest of the budget allows; what they
       leave goes to the short ones

Between tenants, whoever has had the least of the machine (predicted seconds over weight) comes first.
"""

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from ringserve.block_pool import NoFreeSlotsError
from ringserve.config import SchedulerConfig
from ringserve.cost_model import CostModel, StepCost
from ringserve.errors import InvalidValueError, OverloadedError
from ringserve.forecast import Forecast
from ringserve.holdings import Holdings
from ringserve.outputs import Estimate, Progress, Usage
from ringserve.packing import RIDE_SHARE, Packing
from ringserve.placement import Placement, Placer
from ringserve.plan import ModelOutput, SampledTokens, ScheduledRows, SchedulerOutput
from ringserve.plan_writer import PlanWriter
from ringserve.policy import Key
from ringserve.prefix_cache import PrefixCache, chain
from ringserve.request import Request, RequestStatus
from ringserve.tenants import Tenants
from ringserve.updates import RequestUpdate

SMALL = 1 / 16
"""Of a request's blocks: one so much smaller does not delay it. Of each rank's slots: kept for small requests, so that
long prompts that wait for each other do not make everybody wait."""
PATIENCE = 2.0
"""Requests pass one that does not fit yet until it has waited this many times its own time (and a second)."""
QUIET_S = 10.0
"""Without another request for so long, one is alone."""


class Scheduler:
    """Owns the requests and decides each step. `update` must follow each `schedule`."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, cost: CostModel, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.cache, self.pool, self.cost = config, cache, cache.pool, cost
        self.cancelled: Counter[str] = Counter()
        """Requests cancelled while `queued`, in `prefill` or in `decode`."""
        self.refused = 0
        self.parked = 0
        self.tenants = Tenants(config.tenant_weights)
        self.forecast = Forecast(config, cost, self.tenants, cache.block_size)
        self.writer = PlanWriter(cost, cache.block_size)
        self._clock = clock
        self._placer = Placer(cache, cost, config.ring_width)
        self._holdings = Holdings(cache)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        """By handle, oldest admission first."""
        self._decoding: dict[int, Request] = {}
        """Those that miss one token only."""
        self._by_id: dict[str, Request] = {}
        self._in_flight: list[tuple[Request, ScheduledRows]] = []
        self._step_started = 0.0
        self.step_cost = StepCost(cost)
        """What the latest plan asks of each rank."""
        self._last_company = -math.inf
        """When a request last came while another was there."""
        self._full = False
        """No waiting request could start, and nothing has changed since."""

    # Requests come and go

    def add(self, request: Request) -> Estimate:
        """Queue a request that was validated, and tell what is known of it. Raises InvalidValueError when its id is in
        use, OverloadedError when the queue is full, in requests or in predicted seconds."""
        if request.request_id in self._by_id:
            raise InvalidValueError(f"request id {request.request_id!r} is already in use", "request_id")
        try:
            estimate = self.estimate(request)
        except OverloadedError:
            self.refused += 1
            raise
        if self._by_id:
            self._last_company = self._clock()
        self.tenants.join(request.scheduling.tenant, {r.scheduling.tenant for r in self._by_id.values()})
        self._by_id[request.request_id] = request
        self._waiting.append(request)
        self._full = False
        return estimate

    def cancel(self, request_id: str, satisfied: bool = False) -> bool:
        """Stop a request before the next step; not counted as cancelled when its client is `satisfied`. False when it
        is not known (any more)."""
        request = self._by_id.get(request_id)
        if request is None:
            return False
        if not satisfied:
            waits = request.status is RequestStatus.WAITING
            self.cancelled["decode" if request.output_tokens else "queued" if waits else "prefill"] += 1
        self._finish(request)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def queued_s(self) -> float:
        """Predicted seconds of all prefill work that is running or waiting."""
        return self.forecast.work_s(self._all())

    def _all(self) -> Iterator[Request]:
        return itertools.chain(self._running.values(), self._waiting)

    # A step

    def schedule(self) -> SchedulerOutput:
        """The next step. May be empty (no rows) only when there is no work."""
        now = self._clock()
        self._admit(now)
        packing = Packing(self.forecast, self.tenants, self.pool.ring_size, self.cache.block_size, now,
                          lambda request, until: self._make_room(request, until, now))
        packing.add_decodes(list(self._decoding.values()))
        prefills = [r for r in self._running.values() if r.handle not in self._decoding]
        most = self.config.max_chunk_tokens - len(packing.picked)
        if prefills and most > 0:
            packing.add_prefills(prefills, most, self._budget_s(now))
        # Room for one request may have been made by parking another that was picked before.
        picked = [(r, spans) for r, spans in packing.picked if r.status is RequestStatus.RUNNING]
        plan = self.writer.write(picked, self._holdings.take_copies())
        self._in_flight = [(request, rows) for (request, _), rows in zip(picked, plan.rows)]
        self.step_cost, self._step_started = packing.cost, self._clock()
        return plan

    def _budget_s(self, now: float) -> float:
        alone = len(self._by_id) == 1 and now - self._last_company >= QUIET_S
        budget = self.forecast.budget
        return (budget.alone_s if alone else budget.step_s) / self.cost.margin

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """Commit a step that every rank has reported, and say what each request has gained."""
        assert plan.step == output.step == self.writer.step, (plan.step, output.step, self.writer.step)
        now = self._clock()
        seconds = now - self._step_started
        if self._in_flight and seconds > 0:
            self.cost.observe(self.step_cost.features(), seconds)
        sampled = {s.handle: s for s in output.sampled}
        updates: list[RequestUpdate] = []
        gained_s = 0.0
        for request, rows in self._in_flight:
            if request.status is not RequestStatus.RUNNING:
                continue
            if request.handle not in self._decoding:
                gained_s += self.forecast.gained_s(request, rows.spans)
            self._holdings.commit(request, rows.spans)
            if rows.sample:
                updates.append(self._append(request, sampled[rows.handle], now))
            elif request.return_progress and request.progress_is_due(now):
                updates.append(RequestUpdate(request_id=request.request_id, progress=self.progress(request)))
        self._in_flight = []
        if gained_s and seconds > 0:
            self.forecast.measure_pace(gained_s, seconds)
        return updates

    def _append(self, request: Request, sampled: SampledTokens, now: float) -> RequestUpdate:
        if sampled.error is not None:
            self._finish(request)
            return RequestUpdate(request_id=request.request_id, finish_reason="error", error=sampled.error)
        first = request.output_tokens == 0
        if first:
            request.cached_tokens = request.prompt_tokens - request.computed_itself
        taken: list[int] = []
        reason: str | None = None
        for token in sampled.token_ids:
            taken.append(token)
            request.token_ids.append(token)
            reason = request.finish_reason(token)
            if reason is not None:
                break
        progress = self.progress(request) if first and request.return_progress else None
        usage = None
        if reason is not None:
            usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=request.output_tokens,
                          cached_tokens=request.cached_tokens)
            self._finish(request)
        elif request.num_missing == 1:
            self._decoding[request.handle] = request
        else:
            self._decoding.pop(request.handle, None)
        return RequestUpdate(
            request_id=request.request_id, token_ids=taken, logprobs=sampled.logprobs[:len(taken)],
            progress=progress, finish_reason=reason, usage=usage, cached_tokens=request.cached_tokens if first else 0,
            stop_token_id=taken[-1] if reason == "stop" else None)

    # Requests start, are parked, and end

    def _admit(self, now: float) -> None:
        """Start waiting requests whose blocks and output's reserve fit, the most urgent first. Those behind one that
        does not fit may pass it, until it has waited long: then the room that comes free is kept for it, but for those
        that are much smaller."""
        if not self._waiting or self._full or len(self._running) >= self.config.most_running:
            return
        most = math.inf
        for request in sorted(self._waiting, key=lambda r: self._order(r, now)):
            if len(self._running) >= self.config.most_running:
                return
            if len(request.token_ids) > most or self._start(request):
                continue
            if now - request.arrival > 1.0 + PATIENCE * request.total_s:
                most = min(most, len(request.token_ids) * SMALL)
        self._full = bool(self._waiting)

    def _order(self, request: Request, now: float) -> Key:
        # One that was parked, or has output, goes on before others begin.
        return (0.0 if request.output_tokens else 1.0, self.tenants.served(request.scheduling.tenant),
                *self.forecast.urgency(request, now))

    def _start(self, request: Request) -> bool:
        placement = self._place(request, alone=not self._running)
        if placement is None:
            return False
        self._waiting.remove(request)
        self._holdings.take(request, placement)
        request.status = RequestStatus.RUNNING
        request.announced = False
        request.first_cached = min(request.done, request.prompt_tokens)
        self.forecast.weigh(request, request.first_cached, len(request.ranks))
        self._running[request.handle] = request
        return True

    def _place(self, request: Request, alone: bool = False) -> Placement | None:
        """Where its blocks and its reserve would lie now; None when there is no room."""
        known = self._blocks(len(request.token_ids))
        whole = self._whole_blocks(request)
        # Slots of each rank that one of this length must leave.
        leave = self._running and whole > self.pool.total * SMALL / 4
        return self._placer.place(request, known, whole - known,
                                  self.forecast.loads(self._running.values(), self.pool.ring_size),
                                  keep=int(self.pool.slots_per_rank * SMALL) if leave else 0, alone=alone)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _whole_blocks(self, request: Request) -> int:
        """Of its tokens and the reserve for its output."""
        return self._blocks(min(request.max_total_tokens, len(request.token_ids) + self.config.output_reserve))

    def _make_room(self, request: Request, until: int, now: float) -> bool:
        """Blocks for the tokens before `until`. When no rank has room, the request with the most slack is parked, but
        never the oldest: so that one always goes on, and no two can evict each other in a circle. False when the
        request was parked itself, or has to wait a step."""
        while len(request.blocks) < self._blocks(until):
            try:
                self._holdings.grow(request)
            except NoFreeSlotsError:
                if self._holdings.drop_spare_copies(self._running.values()):
                    continue
                oldest = min(self._running.values(), key=lambda r: (r.arrival, r.handle))
                others = [r for r in self._running.values() if r is not oldest]
                assert others, "one request alone always fits"
                # Not one whose blocks are about to be copied: its plan would name slots that are given away.
                others = [r for r in others if r not in self._holdings.copying]
                if not others:
                    return False
                victim = max(others, key=lambda r: (self.forecast.slack_s(r, now), r.arrival, r.handle))
                self._park(victim)
                if victim is request:
                    return False
        return True

    def _park(self, request: Request) -> None:
        """Take a running request's blocks back: complete ones stay in the cache, and are found when it goes on."""
        self.parked += 1
        self._let_go(request)
        request.status = RequestStatus.WAITING
        self._waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
            self._full = False
        else:
            self._let_go(request)
        request.status = RequestStatus.FINISHED
        del self._by_id[request.request_id]

    def _let_go(self, request: Request) -> None:
        del self._running[request.handle]
        self._decoding.pop(request.handle, None)
        self._holdings.let_go(request)
        self.writer.release(request)
        self._full = False

    # What users are told

    def estimate(self, request: Request) -> Estimate:
        """What is known of a request before it runs. Raises OverloadedError as `add` would."""
        self._prepare(request)
        self._check_load(request)
        placement = self._place(request)
        found = placement.found if placement is not None else self._placer.find(request)
        cached = self.cache.block_size * len(found)
        width = len(placement.ranks) if placement is not None else self._placer.width_of(request)
        self.forecast.weigh(request, min(cached, len(request.token_ids) - 1), width)
        queue_s, ahead = (0.0, 0) if placement is not None and not self._full else self._queue_before(request)
        own = request.total_s
        budget_s = self.forecast.budget.step_s
        beside = self.forecast.beside_s(own, self._running.values()) if own > RIDE_SHARE * budget_s else 0.0
        step = min(budget_s, own) if self._running else 0.0
        known = self.cost.steps > 0
        return Estimate(
            prompt_tokens=request.prompt_tokens, cached_tokens=cached, ring_width=width,
            kv_bytes=round(self._whole_blocks(request) * self.cache.block_size * self.cost.kv_bytes_per_token),
            queue_ms=round(queue_s * 1000) if known else None,
            first_token_ms=round((queue_s + own + beside + step) * 1000) if known else None,
            queue_position=ahead)

    def _prepare(self, request: Request) -> None:
        """What follows from the request alone: its keys, its cost, its deadline."""
        ring = self.pool.ring_size
        request.held, request.keys_on, request.reserved = [0] * ring, [0] * ring, [0] * ring
        if self.cache.enabled:
            request.keys = chain(self.cache.first_key(request.scheduling), request.token_ids, self.cache.block_size,
                                 len(request.token_ids) // self.cache.block_size)
        self.forecast.weigh(request, 0, self._placer.width_of(request))
        self.forecast.set_deadline(request)

    def _check_load(self, request: Request) -> None:
        limit = self.config.max_queue_s
        if len(self._waiting) >= self.config.max_waiting_requests + self.config.most_running - len(self._running):
            ends_s = min((self.forecast.remaining_s(r) for r in self._running.values()), default=1.0)
            raise OverloadedError(f"{len(self._waiting)} requests are queued, which is the limit", max(1.0, ends_s))
        if limit is None or not self.has_work:
            return
        # A short one rides along beside long ones: only other short ones are in its way.
        ahead = self.forecast.work_s(self._all(), short_only=self.forecast.rides(request))
        if ahead + request.total_s > limit:
            raise OverloadedError(f"the work in the queue takes about {ahead:.0f} s and this request another "
                                  f"{request.total_s:.0f} s; the limit is {limit:g} s",
                                  max(1.0, ahead + request.total_s - limit))

    def _queue_before(self, request: Request) -> tuple[float, int]:
        """Seconds until there is room for it, and how many come first."""
        now = self._clock()
        ahead = [r for r in self._waiting if self._order(r, now) < self._order(request, now)]
        # About half of what runs must end first.
        return sum(r.total_s for r in ahead) + self.forecast.work_s(self._running.values()) / 2, len(ahead)

    def waiting_updates(self) -> list[RequestUpdate]:
        """Progress of the queued requests that asked for it."""
        if not self._waiting:
            return []
        now = self._clock()
        due = [r for r in self._waiting if r.return_progress and r.progress_is_due(now)]
        if not due:
            return []
        order = {r.handle: place for place, r in enumerate(
            sorted(self._waiting, key=lambda r: self._order(r, now)), 1)}
        return [RequestUpdate(request_id=r.request_id, progress=self.progress(r, order[r.handle])) for r in due]

    def progress(self, request: Request, queue_position: int = 0) -> Progress:
        now = self._clock()
        done = min(request.done, request.prompt_tokens)
        return Progress(
            total=request.prompt_tokens, cached=min(request.first_cached, done), processed=done,
            time_ms=int((now - request.arrival) * 1000), percent=round(self.forecast.percent(request), 2),
            eta_ms=self._eta_ms(request, now), queue_position=queue_position)

    def _eta_ms(self, request: Request, now: float) -> int | None:
        if not self.cost.steps:
            return None
        if request.output_tokens:
            return 0
        then = self.forecast.first_tokens(self._all(), now).get(request.handle)
        left_s = then - now if then is not None else self.forecast.remaining_s(request)  # it has come since
        return max(0, int(1000 * left_s))

    def check(self) -> None:
        """Full invariant check."""
        self._holdings.check(self._running.values())
        assert all(not r.blocks and not any(r.reserved) for r in self._waiting)
        assert set(self._by_id.values()) == set(self._running.values()) | set(self._waiting)
        assert set(self._decoding) <= set(self._running)
        assert all(r.num_missing == 1 for r in self._decoding.values())
