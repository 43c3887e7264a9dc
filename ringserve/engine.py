"""LLMEngine: schedule, execute, update. What it starts with is decided here, once, and said."""

import math
import random
import time
from array import array
from pathlib import Path

from ringserve.block_pool import BlockPool
from ringserve.config import EngineConfig
from ringserve.cost_model import CostModel, Machine
from ringserve.errors import ConfigError
from ringserve.executor import Executor
from ringserve.forecast import StepBudget
from ringserve.outputs import Estimate
from ringserve.plan import unpack_ids
from ringserve.prefix_cache import PrefixCache
from ringserve.rank_messages import CacheReady
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams
from ringserve.scheduler import Scheduler
from ringserve.updates import AddRequest, RequestUpdate

CACHE_SHARE = 0.6
"""Of the memory that is free after the largest step has been run once."""
WARM_UP = "warm-up"
LEARNED_OUTPUT = 8
"""Tokens that each request of the start decodes."""
STEP_S = (0.1, 0.5)
"""Bounds of the default of `max_step_ms`."""
ALONE_S = 0.5
"""The same for a request that is alone: whoever comes next waits that long, once."""


class LLMEngine:
    def __init__(self, config: EngineConfig, executor: Executor, max_model_len: int, vocab_size: int,
                 element_bytes: int, learned: Path | None = None) -> None:
        """`learned`: the file in which what steps cost on this machine is kept from one start to the next."""
        self.config, self.executor = config, executor
        self._vocab_size, self._element_bytes, self._learned = vocab_size, element_bytes, learned
        self._handles = 0
        self.decisions: list[str] = []
        self._size_cache(max_model_len)

    def step(self) -> list[RequestUpdate]:
        plan = self.scheduler.schedule()
        output = self.executor.execute(plan)
        return self.scheduler.update(plan, output)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, command: AddRequest) -> Estimate:
        """Queue a request and tell what is known of it. Raises RequestError when it cannot be queued."""
        return self.scheduler.add(self._request(command))

    def estimate(self, command: AddRequest) -> Estimate:
        """What would become of a request. Raises RequestError when it could not be queued."""
        return self.scheduler.estimate(self._request(command))

    def _request(self, command: AddRequest, ranks: tuple[int, ...] = ()) -> Request:
        params = command.params
        token_ids = unpack_ids(command.token_ids)
        room = self.max_model_len - len(token_ids)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        self._handles += 1
        seed = params.seed if params.seed is not None else random.getrandbits(63)
        return Request(
            request_id=command.request_id, handle=self._handles, token_ids=token_ids, params=params, seed=seed,
            end_token_ids=command.end_token_ids, max_total_tokens=len(token_ids) + most, arrival=time.monotonic(),
            scheduling=command.scheduling, wanted_ranks=ranks, return_progress=command.return_progress)

    def cancel(self, request_id: str, satisfied: bool = False) -> None:
        self.scheduler.cancel(request_id, satisfied)

    # Start-up

    def _size_cache(self, max_model_len: int) -> None:
        """Run the largest chunk once in a small cache, then give the cache what memory is left."""
        block, ring = self.config.cache.block_size, self.executor.ring_size
        if max_model_len < 2:
            raise ConfigError(f"max_model_len must be at least 2, a token of prompt and one of output, got "
                              f"{max_model_len}")
        chunk = min(self.config.scheduler.max_chunk_tokens, max_model_len - 1)
        block_bytes = block * self.executor.kv_bytes_per_token
        self.max_model_len = max_model_len
        blocks = -(-(chunk + 1) // block)
        slots = -(-blocks // ring) + 1
        self._begin(slots, self.executor.allocate(slots))
        self._run_alone(chunk, 1, everywhere=True)

        free = min(self.executor.free_bytes()) // self._ranks_sharing_memory()
        asked = self.config.cache.kv_cache_gib
        if asked is not None:
            if asked * 2**30 / ring > free:
                raise ConfigError(f"kv_cache_gib asks for {asked:g} GiB on {ring} ranks, each of which has "
                                  f"{free / 2**30:.2f} GiB free")
            slots, why = int(asked * 2**30 / block_bytes / ring), "asked for"
        else:
            slots, why = int(free * CACHE_SHARE / block_bytes), f"{CACHE_SHARE:.0%} of free memory"
        # Slots that no request could ever use would only be scanned.
        slots = min(slots, max(64, -(-max_model_len // block) * self.config.scheduler.most_running // ring))
        capacity = slots * block * ring
        if slots < 1:
            raise ConfigError(f"the KV cache has no room for one block of {block} tokens ({block_bytes} bytes) on "
                              f"each of {ring} ranks: give more memory (kv_cache_gib) or a smaller block_size")
        self.max_model_len = min(max_model_len, capacity)
        self._begin(slots, self.executor.allocate(slots))
        self._learn(chunk)
        self.decisions += [
            f"KV cache: {capacity} tokens ({capacity * self.executor.kv_bytes_per_token / 2**30:.2f} GiB, {why}), "
            f"{slots} blocks of {block} on each rank",
            f"longest prompt and output together: {self.max_model_len} tokens (the model's limit is {max_model_len})"]

    def _ranks_sharing_memory(self) -> int:
        return self.executor.ring_size if self.executor.shares_host_memory else 1

    def _begin(self, slots: int, ready: list[CacheReady]) -> None:
        machine = Machine(flops=min(r.attention_flops for r in ready), element_bytes=self._element_bytes,
                          overlaps=not self.executor.shares_host_memory,
                          link_bytes_per_s=min(r.link_bytes_per_s for r in ready) or float("inf"))
        mode = self.config.ring.ring_mode
        cost = CostModel(self.executor.groups, self.executor.linear_flops_per_token, self.executor.ring_size, machine,
                         None if mode == "auto" else mode)
        block = self.config.cache.block_size
        self.pool = BlockPool(self.executor.ring_size, len(self.executor.groups), slots)
        cache = PrefixCache(self.pool, block, lambda index: cost.flops(index * block, (index + 1) * block),
                            enabled=self.config.cache.prefix_cache, identity=repr(self.config.model))
        self.scheduler = Scheduler(self.config.scheduler, cache, cost)
        # Until the costs are known: the largest chunk must be run whole, or its memory would not be seen.
        self.scheduler.forecast.budget = StepBudget(math.inf, math.inf)
        self.scheduler.writer.epoch = self.executor.epoch
        self.machine = machine

    def _learn(self, chunk: int) -> None:
        """What steps cost here: from an earlier start, and from a few steps now. Then steps get their budget."""
        scheduler, asked = self.scheduler, self.config.scheduler.max_step_ms
        known = self._learned is not None and scheduler.cost.load(self._learned)
        chunk = min(chunk, self.max_model_len - 1)
        seconds = self._run_alone(chunk, LEARNED_OUTPUT, everywhere=True)
        one_rank = self.pool.slots_per_rank * self.config.cache.block_size - LEARNED_OUTPUT
        for tokens in (chunk // 2, chunk // 8, 1) if not known else ():
            if 1 <= tokens <= one_rank:
                self._run_alone(tokens, LEARNED_OUTPUT, everywhere=False)
        scheduler.cache.clear()
        if asked is not None:
            budget = StepBudget(asked / 1000, asked / 1000)
            why = "asked for"
        else:
            step_s = min(max(seconds, STEP_S[0]), STEP_S[1])
            budget = StepBudget(step_s, max(ALONE_S, step_s))
            why = (f"a chunk of {chunk} tokens took {seconds * 1000:.0f} ms), {budget.alone_s * 1000:.0f} ms "
                   "while a request is alone (less is wasted")
        scheduler.forecast.budget = budget
        self.decisions.append(f"steps of at most {budget.step_s * 1000:.0f} ms ({why})"
                              + (", costs known from an earlier start" if known else ""))

    def _run_alone(self, tokens: int, output: int, *, everywhere: bool) -> float:
        """Run a request of random tokens to its end; the seconds of its first step."""
        rng = random.Random(tokens)
        prompt = array("I", [rng.randrange(self._vocab_size) for _ in range(tokens)])
        output = min(output, self.max_model_len - tokens)
        self.scheduler.add(self._request(AddRequest(
            request_id=WARM_UP, token_ids=prompt.tobytes(), end_token_ids=(),
            params=SamplingParams(max_tokens=output, temperature=0)),
            tuple(range(self.executor.ring_size)) if everywhere else (0,)))
        started = time.monotonic()
        self.step()
        seconds = time.monotonic() - started
        while self.has_work:
            self.step()
        return seconds

    def save_learned(self) -> None:
        """Keep what was learned for the next start. Raises OSError."""
        if self._learned is not None:
            self.scheduler.cost.save(self._learned)
