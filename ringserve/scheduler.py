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
from collections.abc import Callable, Iterable

from ringserve.block import Block
from ringserve.block_pool import NoFreeSlotsError
from ringserve.config import SchedulerConfig
from ringserve.cost_model import REQUEST, STEP, CostModel, StepCost
from ringserve.errors import InvalidValueError, OverloadedError
from ringserve.outputs import Estimate, Progress, Usage
from ringserve.placement import Placement, Placer
from ringserve.plan import (
    BlockCopy,
    BlocksDealt,
    ModelOutput,
    NewRequest,
    SampledTokens,
    ScheduledRows,
    SchedulerOutput,
    TokensKnown,
    pack_ids,
)
from ringserve.policy import POLICIES, SHORT_STEPS, Key, Prospect
from ringserve.prefix_cache import PrefixCache, chain, next_key
from ringserve.request import Request, RequestStatus
from ringserve.tenants import Tenants
from ringserve.updates import RequestUpdate

HOME_SLACK_BLOCKS = 4
"""Output blocks a home rank may hold beyond the mean and a quarter: short requests do not wander."""
PROGRESS_INTERVAL_S = 0.1
RIDE_SHARE = 0.5
"""Of a step's time and tokens, for short prefills beside others, whatever the policy says: they need not wait until
they are late."""
DEADLINE_BASE_S, DEADLINE_STRETCH = 1.0, 3.0
"""The default wish for a first token: a second, and three times the prefill's own time."""
SMALL = 1 / 16
"""Of a request's blocks: one so much smaller does not delay it. Of each rank's slots: kept for small requests, so that
long prompts that wait for each other do not make everybody wait."""
PATIENCE = 2.0
"""Requests pass one that does not fit yet until it has waited this many times its own time (and a second)."""
QUIET_S = 10.0
"""Without another request for so long, one is alone."""
PACE_MEMORY_S = 5.0
FORECAST_S, FORECAST_EACH_S = 0.25, 0.02
"""A forecast is good for so long, and longer by this for each prefill in it: making it costs more."""
FORECAST_SLICES = 64
LEAST_SHARE = 0.25
"""Of the budget, that one prefill gets in each step even when decoding alone fills it."""


class Scheduler:
    """Owns the requests and decides each step. `update` must follow each `schedule`."""

    def __init__(self, config: SchedulerConfig, cache: PrefixCache, cost: CostModel, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.cache, self.pool, self.cost = config, cache, cache.pool, cost
        self.block_size = cache.block_size
        self.budget_s = math.inf if config.max_step_ms is None else config.max_step_ms / 1000
        """Most seconds that a step should last. The engine sets it when the operator did not."""
        self.alone_budget_s = self.budget_s
        """The same while one request has been alone for a while: larger steps waste less."""
        self.epoch = 0
        self.cancelled: Counter[str] = Counter()
        """Requests cancelled while `queued`, in `prefill` or in `decode`."""
        self.refused = 0
        self.parked = 0
        self.tenants = Tenants(config.tenant_weights)
        self._clock = clock
        self._policy = POLICIES[config.policy]
        self._placer = Placer(cache, cost, config.ring_width)
        self._step = 0
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        """By handle, oldest admission first."""
        self._decoding: dict[int, Request] = {}
        """Those that miss one token only."""
        self._by_id: dict[str, Request] = {}
        self._released: list[int] = []
        self._copies: list[BlockCopy] = []
        self._copying: set[int] = set()
        """Handles of the requests that these are for."""
        self._in_flight: list[tuple[Request, ScheduledRows]] = []
        self._step_started = 0.0
        self._step_cost = StepCost(cost)
        self._last_company = -math.inf
        """When a request last came while another was there."""
        self._pace = 1.0
        self._forecasts: dict[int, float] = {}
        self._forecast_until = -math.inf
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
        self.tenants.join(request.scheduling.tenant, self._active_tenants())
        self._by_id[request.request_id] = request
        self._waiting.append(request)
        self._full = False
        return estimate

    def _prepare(self, request: Request) -> None:
        """What follows from the request alone: its keys, its cost, its deadline."""
        ring = self.pool.ring_size
        request.held, request.keys_on, request.reserved = [0] * ring, [0] * ring, [0] * ring
        if self.cache.enabled:
            request.keys = chain(self.cache.first_key(request.scheduling), request.token_ids, self.block_size,
                                 len(request.token_ids) // self.block_size)
        request.total_s = self._prefill_seconds(0, request.prompt_tokens, self._placer.width_of(request))
        default = DEADLINE_BASE_S + DEADLINE_STRETCH * request.total_s
        wish = request.scheduling.deadline_s or default * 2.0 ** request.scheduling.priority
        request.deadline, request.leniency = request.arrival + wish, wish / default

    def _check_load(self, request: Request) -> None:
        limit = self.config.max_queue_s
        if len(self._waiting) >= self.config.max_waiting_requests + self.config.most_running - len(self._running):
            raise OverloadedError(f"{len(self._waiting)} requests are queued, which is the limit",
                                  self._drain_seconds())
        if limit is None or not (self._waiting or self._running):
            return
        # A short one rides along beside long ones: only other short ones are in its way.
        ahead = self.queued_seconds(short_only=self._rides(request))
        if ahead + request.total_s > limit:
            raise OverloadedError(f"the work in the queue takes about {ahead:.0f} s and this request another "
                                  f"{request.total_s:.0f} s; the limit is {limit:g} s",
                                  max(1.0, ahead + request.total_s - limit))

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

    # A step

    def schedule(self) -> SchedulerOutput:
        """The next step. May be empty (no rows) only when there is no work."""
        now = self._clock()
        self._admit(now)
        cost = self._step_cost = StepCost(self.cost)
        picked: list[tuple[Request, list[tuple[int, int]]]] = []
        self._pick_decodes(cost, picked, now)
        left = self.config.max_chunk_tokens - len(picked)
        prefills = [r for r in self._running.values() if r.handle not in self._decoding]
        if prefills and left > 0:
            self._pick_prefills(cost, picked, prefills, left, now)
        # Room for one request may have been made by parking another that was picked before.
        return self._plan([(r, spans) for r, spans in picked if r.status is RequestStatus.RUNNING])

    def _pick_decodes(self, cost: StepCost, picked: list[tuple[Request, list[tuple[int, int]]]], now: float) -> None:
        size = self.block_size
        for request in list(self._decoding.values()):
            if request.status is not RequestStatus.RUNNING:
                continue
            known = len(request.token_ids)
            if known > len(request.blocks) * size and not self._make_room(request, known, now):
                continue
            if request.decode_work is None:
                tokens = [0] * self.pool.ring_size
                tokens[request.holders[-1]] = 1
                request.decode_work = self.cost.work(known - 1, tokens, request.keys_on)
            cost.add(request.decode_work)
            picked.append((request, [(known - 1, known)]))
        if self.tenants.several and picked:
            share = (cost.seconds() - self.cost.weights[STEP]) / len(picked)
            for request, _ in picked:
                self.tenants.charge(request.scheduling.tenant, share)

    def _pick_prefills(self, cost: StepCost, picked: list[tuple[Request, list[tuple[int, int]]]],
                       prefills: list[Request], left: int, now: float) -> None:
        base, budget_s = cost.seconds(), self._budget(now)
        order: list[tuple[Key, Request]] = []
        riders: list[tuple[float, float, int, Request]] = []
        for request in prefills:
            served = self.tenants.served(request.scheduling.tenant)
            rides = self._rides(request)
            key = self._policy(self._prospect(request), now, self.budget_s)
            # Those who ride have their half of the step; the rest is for the others first, or a stream of short ones
            # would leave nothing for a long one.
            order.append(((rides, served, *key, request.handle), request))
            if rides:
                riders.append((served, request.deadline, request.handle, request))
        done: set[int] = set()
        taken = 0
        share = RIDE_SHARE if len(riders) < len(order) else 1.0
        ride_until = base + share * max(budget_s - base, LEAST_SHARE * budget_s)
        for *_, request in sorted(riders):
            if used := self._take(request, int(left * share) - taken, cost, ride_until, 0, picked, now):
                taken += used
                done.add(request.handle)
        for _, request in sorted(order):
            if taken >= left:
                break
            if request.handle in done or request.status is not RequestStatus.RUNNING:
                continue
            # Whoever is first gets something, whatever it costs: nobody starves.
            least, limit = (0, budget_s) if taken else (
                self.block_size, max(budget_s, base + LEAST_SHARE * budget_s))
            taken += self._take(request, left - taken, cost, limit, least, picked, now)

    def _budget(self, now: float) -> float:
        alone = len(self._by_id) == 1 and now - self._last_company >= QUIET_S
        return (self.alone_budget_s if alone else self.budget_s) / self.cost.margin

    def _take(self, request: Request, most: int, cost: StepCost, limit_s: float, least: int,
              picked: list[tuple[Request, list[tuple[int, int]]]], now: float) -> int:
        """Give a prefill as many tokens as fit the time limit, at least `least`; how many it was given."""
        before = cost.seconds()
        if most <= 0 or (limit_s <= before and not least):
            return 0
        # A first guess by the formula for one request alone; then the step as it is.
        alone = limit_s - before + self.cost.weights[STEP]
        guess = self.cost.chunk_tokens(request.done, len(request.ranks), alone, min(most, request.num_missing),
                                       self.block_size)
        spans = request.missing(self.block_size, guess)
        if not spans:
            return 0
        work = self._work(request, spans)
        for _ in range(4):
            over = cost.seconds(work) - before
            if over <= limit_s - before:
                break
            count = sum(stop - start for start, stop in spans)
            fewer = max(self._whole_blocks(spans, int(count * 0.97 * max(limit_s - before, 0.0) / over)), least)
            if fewer >= count:
                break
            if fewer == 0:
                return 0
            spans = _first(spans, fewer)
            work = self._work(request, spans)
        else:
            if not least:
                return 0
        if not self._make_room(request, spans[-1][1], now):
            return 0
        cost.add(work)
        picked.append((request, spans))
        self.tenants.charge(request.scheduling.tenant, cost.seconds() - before)
        return sum(stop - start for start, stop in spans)

    def _whole_blocks(self, spans: list[tuple[int, int]], count: int) -> int:
        """Of more than a block take whole ones, so that chunks end where ranks change."""
        if count > self.block_size and len(spans) == 1:
            count -= (spans[0][0] + count) % self.block_size
        return count

    def _work(self, request: Request, spans: list[tuple[int, int]]) -> "list[tuple[int, list[float]]]":
        size, holders = self.block_size, request.holders
        tokens = [0] * self.pool.ring_size
        for start, stop in spans:
            while start < stop:
                number = start // size
                until = min(stop, (number + 1) * size)
                tokens[holders[number] if number < len(holders) else request.ranks[-1]] += until - start
                start = until
        return self.cost.work(spans[0][0], tokens, request.keys_on)

    def _plan(self, picked: list[tuple[Request, list[tuple[int, int]]]]) -> SchedulerOutput:
        self._step += 1
        new, tokens, blocks, rows = [], [], [], []
        size = self.block_size
        for request, spans in picked:
            if not request.announced:
                new.append(NewRequest(request.handle, request.params, request.seed, request.end_token_ids,
                                      request.prompt_tokens))
                request.announced, request.announced_tokens, request.announced_blocks = True, 0, 0
            known = len(request.token_ids)
            if request.announced_tokens < known:
                tokens.append(TokensKnown(request.handle, request.announced_tokens,
                                          pack_ids(request.token_ids[request.announced_tokens:])))
                request.announced_tokens = known
            needed = -(-spans[-1][1] // size)
            if request.announced_blocks < needed:
                # Only now: a block that another request computes is told when it is complete.
                blocks.append(self._dealt(request, request.announced_blocks, needed))
                request.announced_blocks = needed
            count = spans[-1][1] - spans[0][0] if len(spans) == 1 else sum(stop - start for start, stop in spans)
            rows.append(ScheduledRows(request.handle, spans, self.cost.modes(count, spans[0][0], len(request.ranks)),
                                      sample=count == len(request.token_ids) - request.done))
        self._in_flight = [(request, r) for (request, _), r in zip(picked, rows)]
        released, self._released = self._released, []
        copies, self._copies, self._copying = self._copies, [], set()
        self._step_started = self._clock()
        return SchedulerOutput(epoch=self.epoch, step=self._step, new=new, tokens=tokens, blocks=blocks,
                               copies=copies, rows=rows, released=released)

    def _dealt(self, request: Request, start: int, stop: int) -> BlocksDealt:
        blocks, holders = request.blocks[start:stop], request.holders[start:stop]
        slots = [block.copies[rank].slots for block, rank in zip(blocks, holders)]
        return BlocksDealt(request.handle, start, holders, [list(group) for group in zip(*slots)],
                           [block.computed for block in blocks])

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """Commit a step that every rank has reported, and say what each request has gained."""
        assert plan.step == output.step == self._step, (plan.step, output.step, self._step)
        now = self._clock()
        if self._in_flight and now > self._step_started:
            self.cost.observe(self._step_cost.features(), now - self._step_started)
        sampled = {s.handle: s for s in output.sampled}
        updates: list[RequestUpdate] = []
        gained_s = 0.0
        for request, rows in self._in_flight:
            if request.status is not RequestStatus.RUNNING:
                continue
            if request.handle not in self._decoding:
                gained_s += self._gained_s(request, rows.spans)
            self._commit(request, rows.spans)
            if rows.sample:
                result = sampled[rows.handle]
                if result.error is not None:
                    self._finish(request)
                    updates.append(RequestUpdate(request_id=request.request_id, finish_reason="error",
                                                 error=result.error))
                else:
                    updates.append(self._append(request, result, now))
            elif request.return_progress and self._progress_is_due(request, now):
                updates.append(RequestUpdate(request_id=request.request_id, progress=self.progress(request)))
        self._in_flight = []
        if gained_s and now > self._step_started:
            self._measure_pace(gained_s, now - self._step_started)
        return updates

    def _gained_s(self, request: Request, spans: list[tuple[int, int]]) -> float:
        """By how much these tokens shorten the rest of its prefill."""
        whole = self.cost.flops(request.first_cached, request.prompt_tokens)
        return sum(self.cost.flops(*span) for span in spans) / whole * request.total_s if whole > 0 else 0.0

    def _commit(self, request: Request, spans: list[tuple[int, int]]) -> None:
        """The tokens of these spans are computed: in every request that shares their blocks."""
        size = self.block_size
        for start, stop in spans:
            while start < stop:
                number = start // size
                until = min(stop, (number + 1) * size)
                block = request.blocks[number]
                block.computed = until - number * size
                for user in block.users:
                    user.block_grew(number, until - start)
                if block.computed == size:
                    block.owner = None
                    if block.key is None and self.cache.enabled:
                        self._publish(request, number)
                start = until
        if request.prompt_tokens > spans[0][0]:
            for start, stop in spans:
                new = min(stop, request.prompt_tokens) - max(start, request.counted_until)
                request.computed_itself += max(0, new)
            request.counted_until = max(request.counted_until, spans[-1][1])

    def _publish(self, request: Request, number: int) -> None:
        """A block that filled up with output, or was computed beside an equal one, may be found from now on."""
        size, token_ids = self.block_size, request.token_ids
        tokens = token_ids[number * size:(number + 1) * size].tobytes()
        if number == len(request.keys):
            before = request.keys[-1] if request.keys else self.cache.first_key(request.scheduling)
            request.keys.append(next_key(before, tokens))
        if number < len(request.keys):
            self.cache.publish(request.blocks[number], request.keys[number], tokens)

    def _append(self, request: Request, sampled: SampledTokens, now: float) -> RequestUpdate:
        first = request.output_tokens == 0
        if first:
            request.cached_tokens = request.prompt_tokens - request.computed_itself
        taken: list[int] = []
        reason: str | None = None
        for token in sampled.token_ids:
            taken.append(token)
            request.token_ids.append(token)
            reason = self._finish_reason(request, token)
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

    def _finish_reason(self, request: Request, token: int) -> str | None:
        params = request.params
        if (token in request.end_token_ids or token in params.stop_token_ids) and (
                request.output_tokens >= params.min_tokens) and (
                token in params.stop_token_ids or not params.ignore_eos):
            return "stop"
        return "length" if len(request.token_ids) >= request.max_total_tokens else None

    # Blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

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
            if len(request.token_ids) > most or self._start(request, now):
                continue
            if now - request.arrival > 1.0 + PATIENCE * request.total_s:
                most = min(most, len(request.token_ids) * SMALL)
        self._full = bool(self._waiting)

    def _order(self, request: Request, now: float) -> Key:
        # One that was parked, or has output, goes on before others begin.
        return (0.0 if request.output_tokens else 1.0, self.tenants.served(request.scheduling.tenant),
                *self._policy(self._prospect(request), now, self.budget_s))

    def _start(self, request: Request, now: float) -> bool:
        known = len(request.token_ids)
        until = min(request.max_total_tokens, known + self.config.output_reserve)
        placement = self._placer.place(request, self._blocks(known), self._blocks(until) - self._blocks(known),
                                       self._loads(), keep=self._kept_back(until), alone=not self._running)
        if placement is None:
            return False
        self._waiting.remove(request)
        self._take_blocks(request, placement)
        request.status = RequestStatus.RUNNING
        request.announced = False
        request.first_cached = min(request.done, request.prompt_tokens)
        request.total_s = max(self._prefill_seconds(request.first_cached, request.prompt_tokens, len(request.ranks)),
                              1e-6)
        self._running[request.handle] = request
        return True

    def _kept_back(self, tokens: int) -> int:
        """Slots of each rank that a request of this length must leave."""
        if not self._running or self._blocks(tokens) <= self.pool.total * SMALL / 4:
            return 0
        return int(self.pool.slots_per_rank * SMALL)

    def _take_blocks(self, request: Request, placement: Placement) -> None:
        cache, size = self.cache, self.block_size
        request.ranks = list(placement.ranks)
        for rank, count in enumerate(placement.reserve):
            self.pool.reserved[rank] += count
        request.reserved = list(placement.reserve)
        found = placement.found
        for block in found.values():  # before anything is evicted to make room
            cache.use(block, request)
        numbers = [n for n in range(len(placement.holders)) if n not in found]
        # Runs of missing blocks share one call, so that their slots are adjacent.
        made = dict(zip(numbers, cache.new_blocks(request, [(n, placement.holders[n]) for n in numbers])))
        for number, rank in enumerate(placement.holders):
            block = found.get(number) or made[number]
            if rank not in block.copies:
                self._copy(block, rank, request.handle)
            request.take_block(block, rank)
            if number in made and number < len(request.keys):
                cache.publish(block, request.keys[number],
                              request.token_ids[number * size:(number + 1) * size].tobytes())

    def _copy(self, block: Block, rank: int, handle: int) -> None:
        assert block.computed == self.block_size
        source = next(iter(block.copies.values()))
        copy = self.cache.add_copy(block, rank)
        self._copying.add(handle)
        self._copies.append(BlockCopy(source.rank, rank, list(source.slots), list(copy.slots)))

    def _make_room(self, request: Request, until: int, now: float) -> bool:
        """Blocks for the tokens before `until`. When no rank has room, the request with the most slack is parked, but
        never the oldest: so that one always goes on, and no two can evict each other in a circle. False when the
        request was parked itself, or has to wait a step."""
        while len(request.blocks) < self._blocks(until):
            try:
                self._grow(request)
            except NoFreeSlotsError:
                if self._drop_spare_copies():
                    continue
                oldest = min(self._running.values(), key=lambda r: (r.arrival, r.handle))
                others = [r for r in self._running.values() if r is not oldest]
                assert others, "one request alone always fits"
                # Not one whose blocks are about to be copied: its plan would name slots that are given away.
                others = [r for r in others if r.handle not in self._copying]
                if not others:
                    return False
                victim = max(others, key=lambda r: (self._slack(r, now), r.arrival, r.handle))
                self._park(victim)
                if victim is request:
                    return False
        return True

    def _drop_spare_copies(self) -> bool:
        """Give up copies that no request uses of blocks that are in use. Whether there were any."""
        dropped = False
        for request in self._running.values():
            for number, block in enumerate(request.blocks):
                if len(block.copies) > 1:
                    used = {user.holders[number] for user in block.users}
                    dropped |= self.cache.keep_copies(block, used)
        return dropped

    def _slack(self, request: Request, now: float) -> float:
        return request.deadline - now - self._prospect(request).remaining_s

    def _grow(self, request: Request) -> None:
        """One more block, on the rank that is the output's home; on any rank when the request's own are full."""
        def has_room(rank: int) -> bool:
            return request.reserved[rank] > 0 or self.cache.room_on(rank) > 0

        held, home = request.held, request.home
        mean = sum(held) / len(request.ranks)
        if home is None or held[home] > 1.25 * mean + HOME_SLACK_BLOCKS or not has_room(home):
            open_ranks = [r for r in request.ranks if has_room(r)] or [
                r for r in range(self.pool.ring_size) if has_room(r)]
            if not open_ranks:
                raise NoFreeSlotsError("what is free is reserved for others")
            home = request.home = min(open_ranks, key=lambda r: (held[r], -self.cache.room_on(r), r))
            if home not in request.ranks:
                request.ranks.append(home)
        last = next((b.copies[home] for b, holder in zip(reversed(request.blocks), reversed(request.holders))
                     if holder == home), None)
        if request.reserved[home]:
            request.reserved[home] -= 1
            self.pool.reserved[home] -= 1
        request.take_block(self.cache.extend(request, home, last, len(request.blocks)), home)

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
        for block in reversed(request.forget_blocks()):
            self.cache.release(block, request)
        for rank, count in enumerate(request.reserved):
            self.pool.reserved[rank] -= count
        request.reserved = [0] * self.pool.ring_size
        self._full = False
        if request.announced:
            self._released.append(request.handle)
            request.announced = False

    # What is known of the future

    def _prefill_seconds(self, start: int, stop: int, width: int) -> float:
        return self.cost.prefill_seconds(start, stop, width, self.budget_s, self.config.max_chunk_tokens,
                                         self.block_size)

    def _prospect(self, request: Request) -> Prospect:
        return Prospect(request.arrival, request.deadline, max(request.total_s, 1e-6), self.remaining_s(request),
                        request.leniency)

    def remaining_s(self, request: Request) -> float:
        """Predicted seconds of the rest of its prefill, alone."""
        if request.output_tokens:
            return 0.0
        if request.status is RequestStatus.WAITING:
            return request.total_s
        whole = self.cost.flops(request.first_cached, request.prompt_tokens)
        left = self.cost.flops(min(request.done, request.prompt_tokens), request.prompt_tokens)
        return request.total_s * left / whole if whole > 0 else 0.0

    def queued_seconds(self, short_only: bool = False) -> float:
        """Predicted seconds of all prefill work that is running or waiting; of the short ones alone, if so asked."""
        return sum(self.remaining_s(r) for r in itertools.chain(self._running.values(), self._waiting)
                   if not short_only or self._rides(r))

    def _rides(self, request: Request) -> bool:
        """Whether a prefill is short enough to be served beside the others."""
        return self.config.ride_along and request.total_s <= SHORT_STEPS * self.budget_s

    def _drain_seconds(self) -> float:
        """Until something should have ended."""
        return max(1.0, min((self.remaining_s(r) for r in self._running.values()), default=1.0))

    def _loads(self) -> list[float]:
        """[ranks] predicted seconds of the work that each rank has."""
        loads = [0.0] * self.pool.ring_size
        for request in self._running.values():
            seconds = self.remaining_s(request) + self.cost.weights[REQUEST]
            for rank in request.ranks:
                loads[rank] += seconds / len(request.ranks)
        return loads

    def _active_tenants(self) -> Iterable[str]:
        return {r.scheduling.tenant for r in self._by_id.values()}

    def _measure_pace(self, gained_s: float, seconds: float) -> None:
        """How fast prefills come along, all together: predicted seconds of their work in a second of a step."""
        weight = 1 - math.exp(-seconds / PACE_MEMORY_S)
        self._pace += weight * (gained_s / seconds - self._pace)

    def _forecast(self, now: float) -> dict[int, float]:
        """When each prefill that is known will have its first token, by handle: the policy played forward in coarse
        slices at the present pace. Nobody knows who will come; that short ones come is in the pace."""
        if now < self._forecast_until:
            return self._forecasts
        left = {r.handle: (r, self.remaining_s(r)) for r in itertools.chain(self._running.values(), self._waiting)
                if not r.output_tokens}
        self._forecast_until = now + FORECAST_S + FORECAST_EACH_S * len(left)
        total = sum(seconds for _, seconds in left.values())
        slice_s = max(self.budget_s if math.isfinite(self.budget_s) else 0.0, total / FORECAST_SLICES, 1e-6)
        pace = min(max(self._pace, 0.05), 2.0)
        then, forecasts = now, {}
        served = {r.scheduling.tenant: self.tenants.served(r.scheduling.tenant) for r, _ in left.values()}
        while left:
            def key(entry: tuple[Request, float], then: float = then) -> Key:
                request, seconds = entry
                prospect = Prospect(request.arrival, request.deadline, max(request.total_s, 1e-6), seconds,
                                    request.leniency)
                return (served[request.scheduling.tenant], *self._policy(prospect, then, self.budget_s))

            request, seconds = min(left.values(), key=key)
            worked = min(slice_s, seconds)
            then += worked / pace
            served[request.scheduling.tenant] += worked
            if seconds - worked <= 1e-9:
                forecasts[request.handle] = then
                del left[request.handle]
            else:
                left[request.handle] = (request, seconds - worked)
        self._forecasts = forecasts
        return forecasts

    def _wait_beside(self, own_s: float, others: Iterable[Request]) -> float:
        """Seconds that others take while `own_s` of work is done: each as much as this request, or what it still has
        to do if that is less (processor sharing)."""
        return sum(min(self.remaining_s(r), own_s) for r in others)

    def estimate(self, request: Request) -> Estimate:
        """What is known of a request before it runs. Raises OverloadedError as `add` would."""
        self._prepare(request)
        self._check_load(request)
        known = len(request.token_ids)
        until = min(request.max_total_tokens, known + self.config.output_reserve)
        placement = self._placer.place(request, self._blocks(known), self._blocks(until) - self._blocks(known),
                                       self._loads(), keep=self._kept_back(until))
        found = placement.found if placement is not None else self._placer.find(request)
        cached = self.block_size * len(found)
        width = len(placement.ranks) if placement is not None else self._placer.width_of(request)
        own = self._prefill_seconds(min(cached, known - 1), known, width)
        request.total_s = max(own, 1e-6)
        return self._estimate(request, cached, width, self._blocks(until), placement is not None and not self._full)

    def _estimate(self, request: Request, cached: int, width: int, blocks: int, fits_now: bool) -> Estimate:
        now = self._clock()
        ahead = [] if fits_now else [r for r in self._waiting if self._order(r, now) < self._order(request, now)]
        # Where it has to wait for room, about half of what runs must end first.
        queue = 0.0 if fits_now else (sum(r.total_s for r in ahead)
                                      + sum(self.remaining_s(r) for r in self._running.values()) / 2)
        own = request.total_s
        beside = self._wait_beside(own, self._running.values()) if own > RIDE_SHARE * self.budget_s else 0.0
        known = self.cost.steps > 0
        step = min(self.budget_s, own) if self._running else 0.0
        return Estimate(
            prompt_tokens=request.prompt_tokens, cached_tokens=cached, ring_width=width,
            kv_bytes=round(blocks * self.block_size * self.cost.kv_bytes_per_token),
            queue_ms=round(queue * 1000) if known else None,
            first_token_ms=round((queue + own + beside + step) * 1000) if known else None,
            queue_position=len(ahead))

    def waiting_updates(self) -> list[RequestUpdate]:
        """Progress of the queued requests that asked for it."""
        if not self._waiting:
            return []
        now = self._clock()
        due = [r for r in self._waiting if r.return_progress and self._progress_is_due(r, now)]
        if not due:
            return []
        order = {r.handle: place for place, r in enumerate(
            sorted(self._waiting, key=lambda r: self._order(r, now)), 1)}
        return [RequestUpdate(request_id=r.request_id, progress=self.progress(r, order[r.handle])) for r in due]

    def progress(self, request: Request, queue_position: int = 0) -> Progress:
        now = self._clock()
        done = min(request.done, request.prompt_tokens)
        whole = self.cost.flops(0, request.prompt_tokens)
        return Progress(
            total=request.prompt_tokens, cached=min(request.first_cached, done), processed=done,
            time_ms=int((now - request.arrival) * 1000),
            percent=round(100.0 * self.cost.flops(0, done) / whole, 2) if whole else 100.0,
            eta_ms=self._eta_ms(request, now), queue_position=queue_position)

    def _eta_ms(self, request: Request, now: float) -> int | None:
        if not self.cost.steps:
            return None
        then = self._forecast(now).get(request.handle)
        if then is None:  # it came since the last forecast
            then = now + self.remaining_s(request)
        return max(0, int(1000 * (then - now))) if not request.output_tokens else 0

    def _progress_is_due(self, request: Request, now: float) -> bool:
        """Whether the last word is a while ago: steps may take milliseconds."""
        due = now - request.last_progress >= PROGRESS_INTERVAL_S
        if due:
            request.last_progress = now
        return due

    def check(self) -> None:
        """Full invariant check of requests against the cache and the pool."""
        self.cache.check()
        used = {id(block): block for request in self._running.values() for block in request.blocks}
        copies = {copy for block in used.values() for copy in block.copies.values()}
        idle = {copy for block in self.cache._blocks.values() if not block.users for copy in block.copies.values()}
        assert copies | idle == self.pool._used and not copies & idle, "slots that no block has"
        assert self.pool.reserved == [sum(r.reserved[rank] for r in self._running.values())
                                      for rank in range(self.pool.ring_size)]
        for request in self._running.values():
            request.check(self.block_size)
        for block in used.values():
            assert block.owner is None or block.owner in block.users
            assert block.computed == self.block_size or block.owner is not None, "a block that nobody computes"
        assert all(not r.blocks and not any(r.reserved) for r in self._waiting)
        assert set(self._by_id.values()) == set(self._running.values()) | set(self._waiting)
        assert set(self._decoding) <= set(self._running)
        assert all(r.num_missing == 1 for r in self._decoding.values())


def _first(spans: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first `count` tokens of these spans."""
    taken: list[tuple[int, int]] = []
    for start, stop in spans:
        if count <= 0:
            break
        taken.append((start, min(stop, start + count)))
        count -= stop - start
    return taken
