"""Teacher forcing: the engine's own steps on a known text, with the logits it computed on the way.

For `ringserve selftest` and the tests of exactness: greedy tokens alone hide almost every error.
"""

import time
from array import array
from collections.abc import Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from ringserve.engine import LLMEngine
from ringserve.plan import ModelOutput, SampledTokens, SchedulerOutput
from ringserve.request import Request
from ringserve.sampling_params import SamplingParams

Logits = dict[int, NDArray[np.float32]]
"""By position: the logits that predict the token after it."""


class Teacher:
    """Runs texts through an engine's scheduler and ranks; what would be sampled is replaced by what the text says."""

    def __init__(self, engine: LLMEngine, everywhere: bool = True) -> None:
        """`everywhere`: texts use all ranks, however short; otherwise as many as the engine chooses."""
        self._engine = engine
        self._ranks = tuple(range(engine.executor.ring_size)) if everywhere else ()
        self.plans: list[SchedulerOutput] = []
        self.outputs: list[ModelOutput] = []

    def run(self, texts: Sequence[Sequence[int]], prompt_tokens: Sequence[int],
            positions: Collection[int] | None = None) -> list[Logits]:
        """Feed each text's first `prompt_tokens` as a prompt and the rest token by token, all requests together.
        Returns the logits at `positions` (all by default)."""
        engine = self._engine
        requests = [Request(
            request_id=f"teacher-{i}", handle=-1 - i, token_ids=array("I", text[:prompt]),
            params=SamplingParams(max_tokens=len(text) - prompt + 1, temperature=0), seed=0, end_token_ids=(),
            max_total_tokens=len(text) + 1, wanted_ranks=self._ranks,
            arrival=time.monotonic())
            for i, (text, prompt) in enumerate(zip(texts, prompt_tokens))]
        for request in requests:
            engine.scheduler.add(request)
        logits: list[Logits] = [{} for _ in texts]
        while engine.has_work:
            plan = self._wanting_logits(engine.scheduler.schedule(), positions)
            output = engine.executor.execute(plan)
            self.plans.append(plan)
            self.outputs.append(output)
            for row in (row for rank in output.ranks for row in rank.logits):
                logits[-1 - row.handle][row.position] = np.frombuffer(row.logits, dtype=np.float32)
            engine.scheduler.update(plan, self._forced(output, requests, texts))
        return logits

    def _wanting_logits(self, plan: SchedulerOutput, positions: Collection[int] | None) -> SchedulerOutput:
        rows = [msgspec.structs.replace(rows, logits_at=[
            position for span in rows.spans for position in range(*span)
            if positions is None or position in positions]) for rows in plan.rows]
        return msgspec.structs.replace(plan, rows=rows)

    def _forced(self, output: ModelOutput, requests: Sequence[Request],
                texts: Sequence[Sequence[int]]) -> ModelOutput:
        def next_token(sampled: SampledTokens) -> SampledTokens:
            number = -1 - sampled.handle
            known = len(requests[number].token_ids)
            text = texts[number]
            return SampledTokens(sampled.handle, [text[known] if known < len(text) else 0], [])

        return msgspec.structs.replace(output, sampled=[next_token(s) for s in output.sampled])
