"""A scheduler driven without a model: ranks that know nothing but the plans, and answer by a checksum.

What they check at each step is what real ranks rely on: every token is known before it is computed, every
earlier token's key is in the slot that the plans said: made from the same tokens, whoever computed or copied it.
"""

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from ringserve.block_pool import BlockPool
from ringserve.config import PolicyName, SchedulerConfig
from ringserve.cost_model import CostModel, Machine
from ringserve.plan import (
    LayerGroup,
    ModelOutput,
    NewRequest,
    SampledTokens,
    ScheduledRows,
    SchedulerOutput,
    unpack_ids,
)
from ringserve.prefix_cache import PrefixCache
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams
from ringserve.scheduler import Scheduler
from ringserve.scheduling_params import SchedulingParams
from ringserve.updates import RequestUpdate

VOCABULARY = 24
END = 0
MACHINE = Machine(flops=1e9, link_bytes_per_s=1e9, element_bytes=4, overlaps=True)


def layer_group(window: int | None = None, layers: int = 1) -> LayerGroup:
    return LayerGroup(num_kv_heads=1, key_dim=8, value_dim=8, window=window, layers=tuple(range(layers)),
                      num_heads=2, key_bytes=16 * 4)


def next_token(token_ids: Sequence[int], params: SamplingParams, prompt_tokens: int) -> int:
    """A pure function of what came before, as a model is; ends are forbidden before `min_tokens`."""
    token = zlib.crc32(array("I", token_ids).tobytes()) % VOCABULARY
    forbidden = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
    while len(token_ids) - prompt_tokens < params.min_tokens and token in forbidden:
        token = (token + 1) % VOCABULARY
    return token


def expected_output(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    """What a request must give however it is scheduled, parked and recomputed."""
    token_ids = list(prompt)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
    assert params.max_tokens is not None
    while len(token_ids) < len(prompt) + params.max_tokens:
        token_ids.append(next_token(token_ids, params, len(prompt)))
        if token_ids[-1] in ends and len(token_ids) - len(prompt) >= params.min_tokens:
            break
    return token_ids[len(prompt):]


@dataclass
class FakeTable:
    """One request as the ranks know it."""

    new: NewRequest
    token_ids: list[int] = field(default_factory=list)
    blocks: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """(holder, slot per group) of each block."""
    computed: set[int] = field(default_factory=set)
    meanings: list[int] = field(default_factory=list)
    """What the key of each position is made from: a checksum of all tokens up to it."""

    def know(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        for token in self.token_ids[len(self.meanings):]:
            self.meanings.append(hash((self.meanings[-1] if self.meanings else 0, token)))


class FakeRanks:
    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool, self._block_size = pool, block_size
        self.tables: dict[int, FakeTable] = {}
        self.stored: dict[tuple[int, int, int], int] = {}
        """(rank, group, token of its storage) -> the meaning of the key that is there."""
        self.computed = 0
        """Rows over all steps."""
        self.copied = 0
        self.errors: dict[int, str] = {}
        """What sampling will fail with, by handle."""

    def execute(self, plan: SchedulerOutput) -> ModelOutput:
        self.take_in(plan)
        return ModelOutput(plan.step, [self._sample(rows) for rows in plan.rows if rows.sample], [])

    def take_in(self, plan: SchedulerOutput) -> None:
        for handle in plan.released:
            del self.tables[handle]
        for new in plan.new:
            assert new.handle not in self.tables, "announced twice"
            self.tables[new.handle] = FakeTable(new)
        for tokens in plan.tokens:
            table = self.tables[tokens.handle]
            assert tokens.start == len(table.token_ids), "tokens skipped or sent twice"
            table.know(unpack_ids(tokens.token_ids))
        for dealt in plan.blocks:
            table = self.tables[dealt.handle]
            assert dealt.start == len(table.blocks), "blocks skipped or sent twice"
            assert len(dealt.slots) == self._pool.groups
            table.blocks += zip(dealt.holders, zip(*dealt.slots), strict=True)
            for number, computed in enumerate(dealt.computed, dealt.start):
                table.computed |= set(range(number * self._block_size, number * self._block_size + computed))
        written = [(copy.destination, *copy.destination_slots) for copy in plan.copies]
        assert len(written) == len(set(written)), "a slot written twice"
        assert not {(copy.source, *copy.source_slots) for copy in plan.copies} & set(written), "a copy of a copy"
        for copy in plan.copies:
            assert copy.source != copy.destination
            for group, (source, destination) in enumerate(zip(copy.source_slots, copy.destination_slots)):
                for i in range(self._block_size):
                    self.stored[copy.destination, group, destination * self._block_size + i] = self.stored[
                        copy.source, group, source * self._block_size + i]
            self.copied += 1
        assert len({rows.handle for rows in plan.rows}) == len(plan.rows), "a request twice in a step"
        for rows in plan.rows:
            self._compute(rows)

    def _compute(self, rows: ScheduledRows) -> None:
        table = self.tables[rows.handle]
        assert len(rows.modes) == self._pool.groups
        positions = [p for start, stop in rows.spans for p in range(start, stop)]
        assert positions and positions == sorted(set(positions))
        assert positions[-1] < len(table.token_ids), "a token that the ranks do not know"
        assert not table.computed & set(positions), "computed twice"
        for position in positions:
            for place in self._places(table, position):
                self.stored[place] = table.meanings[position]
        table.computed |= set(positions)
        self.computed += len(positions)
        for earlier in range(positions[-1] + 1):
            assert earlier in table.computed, "a row before its keys"
            for place in self._places(table, earlier):
                assert self.stored[place] == table.meanings[earlier], "somebody else's key"
        assert rows.sample == (positions[-1] == len(table.token_ids) - 1)

    def _places(self, table: FakeTable, position: int) -> list[tuple[int, int, int]]:
        holder, slots = table.blocks[position // self._block_size]
        assert all(slot < self._pool.slots_per_rank for slot in slots)
        return [(holder, group, slot * self._block_size + position % self._block_size)
                for group, slot in enumerate(slots)]

    def _sample(self, rows: ScheduledRows) -> SampledTokens:
        table = self.tables[rows.handle]
        if rows.handle in self.errors:
            return SampledTokens(rows.handle, [], [], error=self.errors[rows.handle])
        assert table.new.end_token_ids == (END,)
        token = next_token(table.token_ids, table.new.params, table.new.prompt_tokens)
        return SampledTokens(rows.handle, [token], [])


class Driven:
    """A scheduler with its pool and fake ranks, on a clock of its own; `check` after each step."""

    def __init__(self, *, ring: int = 2, slots: int = 64, block: int = 4, chunk: int = 32, running: int = 8,
                 reserve: int = 8, groups: Sequence[LayerGroup] = (layer_group(),), policy: PolicyName = "fcfs",
                 prefix_cache: bool = False, width: int | None = 64, max_step_ms: float | None = None,
                 weights: tuple[str, ...] = (), max_queue_s: float | None = None,
                 ride_along: bool | None = None) -> None:
        self.block = block
        self.pool = BlockPool(ring, len(groups), slots)
        self.cost = CostModel(groups, 100.0, ring, MACHINE)
        self.cache = PrefixCache(self.pool, block, lambda index: self.cost.flops(index * block, (index + 1) * block),
                                 enabled=prefix_cache)
        config = SchedulerConfig(max_chunk_tokens=chunk, max_running_requests=running, output_reserve=reserve,
                                 policy=policy, ring_width=width, max_step_ms=max_step_ms, tenant_weights=weights,
                                 max_queue_s=max_queue_s,
                                 ride_along=policy != "fcfs" if ride_along is None else ride_along)
        self.now = 0.0
        self.scheduler = Scheduler(config, self.cache, self.cost, clock=lambda: self.now)
        self.ranks = FakeRanks(self.pool, block)
        self._handles = 0
        self.requests: dict[str, Request] = {}
        self.output: dict[str, list[int]] = {}
        self.ended: dict[str, RequestUpdate] = {}
        self.updates: list[RequestUpdate] = []

    @property
    def capacity(self) -> int:
        return self.pool.total * self.block

    def add(self, name: str, prompt: Sequence[int], *, return_progress: bool = False,
            scheduling: SchedulingParams | None = None, **params: object) -> Request:
        known = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **params})  # type: ignore[arg-type]
        assert known.max_tokens is not None
        self._handles += 1
        request = Request(
            request_id=name, handle=self._handles, token_ids=array("I", prompt), params=known, seed=0,
            end_token_ids=(END,), max_total_tokens=len(prompt) + known.max_tokens,
            arrival=self.now + 1e-9 * self._handles, scheduling=scheduling or SchedulingParams(),
            return_progress=return_progress)
        self.scheduler.add(request)
        self.requests[name] = request
        self.output[name] = []
        return request

    def step(self) -> SchedulerOutput:
        had_work = self.scheduler.has_work
        plan = self.scheduler.schedule()
        assert (plan.num_tokens > 0) == had_work, "a step without rows though there is work"
        assert plan.num_tokens <= self.scheduler.config.max_chunk_tokens
        self.commit(plan)
        return plan

    def commit(self, plan: SchedulerOutput) -> None:
        output = self.ranks.execute(plan)
        self.now += max(self.scheduler.step_cost.seconds(), 1e-4)
        self.updates = self.scheduler.update(plan, output)
        self.scheduler.check()
        for update in self.updates:
            self.output[update.request_id] += update.token_ids
            if update.finish_reason is not None:
                assert update.request_id not in self.ended, "finished twice"
                self.ended[update.request_id] = update

    def finish(self, most_steps: int = 2000) -> list[SchedulerOutput]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) <= most_steps, "requests evict each other in a circle"
        self.cache.clear()
        room = [self.cache.room_on(rank) for rank in range(self.pool.ring_size)]
        assert room == [self.pool.slots_per_rank] * self.pool.ring_size, "blocks or reservations were lost"
        return plans

    def assert_right(self, name: str) -> None:
        """The request gave what it must give."""
        request = self.requests[name]
        prompt = request.token_ids[:request.prompt_tokens]
        assert self.output[name] == expected_output(prompt, request.params)
