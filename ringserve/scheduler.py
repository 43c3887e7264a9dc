"""Scheduler: picks, in position order, the missing tokens to compute next. No torch, no processes.

There is no prefill phase and no decode phase: a prompt is many missing tokens, a decoding request one.
First come, first served here; what may change later is the order of `_running` and the size of the slices.
"""

import itertools
import time
from collections import deque

from ringserve.block_pool import BlockPool, NoFreeSlotsError
from ringserve.config import SchedulerConfig
from ringserve.cost_model import CostModel
from ringserve.errors import InvalidValueError
from ringserve.outputs import Progress, Usage
from ringserve.plan import (
    BlocksDealt,
    ModelOutput,
    NewRequest,
    SampledTokens,
    ScheduledRows,
    SchedulerOutput,
    TokensKnown,
    pack_ids,
)
from ringserve.request import Request, RequestStatus
from ringserve.updates import RequestUpdate

HOME_SLACK_BLOCKS = 4
"""Output blocks a home rank may hold beyond the mean and a quarter: short requests do not wander."""

PROGRESS_INTERVAL_S = 0.1


class Scheduler:
    """Owns the requests and decides each step. `update` must follow each `schedule`."""

    def __init__(self, config: SchedulerConfig, block_size: int, pool: BlockPool, cost: CostModel) -> None:
        self.config, self.block_size, self.pool, self.cost = config, block_size, pool, cost
        self.epoch = 0
        self._step = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._by_id: dict[str, Request] = {}
        self._released: list[int] = []
        self._in_flight: dict[int, tuple[Request, ScheduledRows]] = {}
        self._step_started = 0.0

    # Requests come and go

    def add(self, request: Request) -> None:
        """Queue a request that was validated. Raises InvalidValueError when its id is in use."""
        if request.request_id in self._by_id:
            raise InvalidValueError(f"request id {request.request_id!r} is already in use", "request_id")
        self._by_id[request.request_id] = request
        self._waiting.append(request)

    def cancel(self, request_id: str) -> bool:
        """Stop a request before the next step. False when it is not known (any more)."""
        request = self._by_id.get(request_id)
        if request is None:
            return False
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
        """The next step: one missing token of every decoding request, then the oldest prompts' missing tokens.

        May be empty (no rows) only when there is no work."""
        self._admit()
        budget = self.config.max_chunk_tokens
        picked: dict[int, tuple[Request, list[tuple[int, int]]]] = {}
        dealt: list[BlocksDealt] = []
        for decoding in (True, False):
            for request in list(self._running):
                if budget == 0 or request.handle in picked or request.status is not RequestStatus.RUNNING:
                    continue
                if decoding and request.num_missing(self.block_size) > 1:
                    continue
                spans = request.missing(self.block_size, budget)
                if self._make_room(request, spans[-1][1], dealt):
                    picked[request.handle] = (request, spans)
                    budget -= sum(stop - start for start, stop in spans)
        # Room for an older request may have been made by parking a younger one that was picked before.
        live = [(r, spans) for r, spans in picked.values() if r.status is RequestStatus.RUNNING]
        return self._plan(live, dealt)

    def _plan(self, picked: list[tuple[Request, list[tuple[int, int]]]],
              dealt: list[BlocksDealt]) -> SchedulerOutput:
        self._step += 1
        new, tokens, rows = [], [], []
        for request, spans in picked:
            if not request.announced:
                new.append(NewRequest(request.handle, request.params, request.seed, request.end_token_ids,
                                      request.prompt_tokens))
                dealt = [d for d in dealt if d.handle != request.handle]
                dealt.append(self._dealt(request, 0))
                request.announced, request.announced_tokens = True, 0
            known = len(request.token_ids)
            if request.announced_tokens < known:
                start = request.announced_tokens
                tokens.append(TokensKnown(request.handle, start, pack_ids(request.token_ids[start:])))
                request.announced_tokens = known
            count = sum(stop - start for start, stop in spans)
            rows.append(ScheduledRows(request.handle, spans, self.cost.modes(count, spans[0][0]),
                                      sample=count == request.num_missing(self.block_size)))
        live = {request.handle for request, _ in picked}
        self._in_flight = {request.handle: (request, r) for (request, _), r in zip(picked, rows)}
        released, self._released = self._released, []
        self._step_started = time.monotonic()
        return SchedulerOutput(epoch=self.epoch, step=self._step, new=new, tokens=tokens, rows=rows,
                               blocks=[d for d in dealt if d.handle in live], released=released)

    def update(self, plan: SchedulerOutput, output: ModelOutput) -> list[RequestUpdate]:
        """Commit a step that every rank has reported, and say what each request has gained."""
        assert plan.step == output.step == self._step, (plan.step, output.step, self._step)
        seconds = time.monotonic() - self._step_started
        if plan.num_tokens > len(plan.rows):
            self.cost.observe(sum(self.cost.flops(*span) for rows in plan.rows for span in rows.spans), seconds)
        sampled = {s.handle: s for s in output.sampled}
        updates: list[RequestUpdate] = []
        for handle, (request, rows) in self._in_flight.items():
            if request.status is not RequestStatus.RUNNING:
                continue
            request.mark_computed(rows.spans, self.block_size)
            if rows.sample and sampled[handle].error is not None:
                self._finish(request)
                updates.append(RequestUpdate(request_id=request.request_id, finish_reason="error",
                                             error=sampled[handle].error))
            elif rows.sample:
                updates.append(self._append(request, sampled[handle]))
            elif self._progress_is_due(request):
                updates.append(RequestUpdate(request_id=request.request_id, progress=self.progress(request)))
        self._in_flight = {}
        return updates

    def _append(self, request: Request, sampled: SampledTokens) -> RequestUpdate:
        taken: list[int] = []
        reason: str | None = None
        for token in sampled.token_ids:
            taken.append(token)
            request.token_ids.append(token)
            reason = self._finish_reason(request, token)
            if reason is not None:
                break
        first = request.return_progress and request.output_tokens == len(taken)
        progress = self.progress(request) if first else None
        usage = None
        if reason is not None:
            usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=request.output_tokens,
                          cached_tokens=request.cached_tokens)
            self._finish(request)
        return RequestUpdate(
            request_id=request.request_id, token_ids=taken, logprobs=sampled.logprobs[:len(taken)],
            progress=progress, finish_reason=reason, usage=usage,
            stop_token_id=taken[-1] if reason == "stop" else None)

    def _finish_reason(self, request: Request, token: int) -> str | None:
        params = request.params
        if request.output_tokens >= params.min_tokens and (
                token in params.stop_token_ids or (not params.ignore_eos and token in request.end_token_ids)):
            return "stop"
        return "length" if len(request.token_ids) >= request.max_total_tokens else None

    # Blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _admit(self) -> None:
        """Start waiting requests, oldest first, while their blocks and their output's reserve fit."""
        while self._waiting and len(self._running) < self.config.most_running:
            request = self._waiting[0]
            known = len(request.token_ids)
            until = min(request.max_total_tokens, known + self.config.output_reserve)
            needed, reserve = self._blocks(known), self._blocks(until) - self._blocks(known)
            if needed + reserve > self.pool.unreserved:
                return
            try:
                request.blocks = self.pool.deal(request.ranks, needed, [0] * self.pool.ring_size)
            except NoFreeSlotsError:
                return
            request.computed.extend([0] * needed)
            self.pool.reserve(reserve)
            request.reserved = reserve
            request.status = RequestStatus.RUNNING
            request.announced = False
            self._running.append(self._waiting.popleft())

    def _make_room(self, request: Request, until: int, dealt: list[BlocksDealt]) -> bool:
        """Blocks for the tokens before `until`. When the pool is dry the youngest request is parked, so the
        oldest always goes on and no two can evict each other in a circle. False when it was parked itself."""
        while len(request.blocks) < self._blocks(until):
            try:
                self._grow(request)
            except NoFreeSlotsError:
                youngest = self._running[-1]
                self._park(youngest)
                if youngest is request:
                    return False
                continue
            dealt.append(self._dealt(request, len(request.blocks) - 1))
        return True

    def _grow(self, request: Request) -> None:
        if request.reserved:
            self.pool.unreserve(1)
            request.reserved -= 1
        elif self.pool.unreserved < 1:
            raise NoFreeSlotsError("what is free is reserved for others")
        held = [0] * self.pool.ring_size
        for block in request.blocks:
            held[block.rank] += 1
        mean = sum(held) / len(request.ranks)
        home = request.home
        if home is None or held[home] > 1.25 * mean + HOME_SLACK_BLOCKS or not self.pool.free_on(home):
            open_ranks = [r for r in request.ranks if self.pool.free_on(r)]
            if not open_ranks:
                raise NoFreeSlotsError(f"no free slot on ranks {request.ranks}")
            home = request.home = min(open_ranks, key=lambda r: (held[r], -self.pool.free_on(r), r))
        last = next((b for b in reversed(request.blocks) if b.rank == home), None)
        request.blocks.append(self.pool.extend(home, last))
        request.computed.append(0)

    def _dealt(self, request: Request, start: int) -> BlocksDealt:
        blocks = request.blocks[start:]
        return BlocksDealt(request.handle, start, [b.rank for b in blocks],
                           [list(slots) for slots in zip(*(b.slots for b in blocks))], [0] * len(blocks))

    def _park(self, request: Request) -> None:
        """Take a running request's blocks back; it is recomputed from its known tokens when there is room."""
        self._let_go(request)
        request.status = RequestStatus.WAITING
        self._waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        else:
            self._let_go(request)
        request.status = RequestStatus.FINISHED
        del self._by_id[request.request_id]

    def _let_go(self, request: Request) -> None:
        self._running.remove(request)
        self.pool.release(request.drop_blocks())
        self.pool.unreserve(request.reserved)
        request.reserved = 0
        if request.announced:
            self._released.append(request.handle)
            request.announced = False

    # What is known of the future

    def waiting_updates(self) -> list[RequestUpdate]:
        """Progress of the queued requests that asked for it."""
        return [RequestUpdate(request_id=r.request_id, progress=self.progress(r, place))
                for place, r in enumerate(self._waiting, 1) if self._progress_is_due(r)]

    def progress(self, request: Request, queue_position: int = 0) -> Progress:
        done = min(request.num_computed(), request.prompt_tokens)
        whole = self.cost.flops(0, request.prompt_tokens)
        spent = self.cost.flops(0, done)
        before = [*self._running, *itertools.islice(self._waiting, queue_position - 1)] if queue_position else []
        work = whole - spent + sum(self._remaining(r) for r in before)
        tokens = sum(r.prompt_tokens - min(r.num_computed(), r.prompt_tokens) for r in [request, *before])
        eta = self.cost.seconds(work, -(-tokens // self.config.max_chunk_tokens))
        return Progress(
            total=request.prompt_tokens, cached=request.cached_tokens, processed=done,
            time_ms=int((time.monotonic() - request.arrival) * 1000),
            percent=round(100.0 * spent / whole, 2), eta_ms=None if eta is None else int(eta * 1000),
            queue_position=queue_position)

    def _progress_is_due(self, request: Request) -> bool:
        """Whether it was asked for and the last word is a while ago: steps may take milliseconds."""
        now = time.monotonic()
        due = request.return_progress and now - request.last_progress >= PROGRESS_INTERVAL_S
        if due:
            request.last_progress = now
        return due

    def _remaining(self, request: Request) -> float:
        return self.cost.flops(min(request.num_computed(), request.prompt_tokens), request.prompt_tokens)

    def check(self) -> None:
        """Full invariant check of requests against the pool."""
        self.pool.check()
        held = [block for request in self._running for block in request.blocks]
        assert len(held) == len(set(held)) == len(self.pool._references)
        assert self.pool.reserved == sum(r.reserved for r in self._running)
        for request in self._running:
            request.check(self.block_size)
        assert all(not r.blocks and not r.reserved for r in self._waiting)
        assert set(self._by_id.values()) == set(self._running) | set(self._waiting)
