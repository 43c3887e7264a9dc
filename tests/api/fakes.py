"""A tokenizer of bytes and an engine that repeats its prompt: enough to test the whole server in seconds."""

import asyncio
import codecs
import math
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringserve.errors import ContextLengthError, EngineDeadError, InvalidValueError, RequestError
from ringserve.outputs import Estimate, Progress, RequestOutput, TokenLogprob, Usage
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams

END = 256
VOCAB_SIZE = 258
NO_WISHES = SchedulingParams()


def sleepy_text(seconds: float, length: int) -> str:
    """A text that holds up the process in which a ByteTokenizer encodes it."""
    return f"SLEEP {seconds} " + "x" * length


class ByteTokenizer:
    """One token per byte."""

    def __init__(self, source: str = "bytes") -> None:
        self.source = source

    @classmethod
    def from_source(cls, source: str) -> "ByteTokenizer":
        return cls(source)

    def encode(self, text: str, allow_special: bool, *, tenant: str = "") -> "array[int]":
        if text.startswith("SLEEP "):
            time.sleep(float(text.split(" ", 2)[1]))
        return array("I", list(text.encode()))

    def encode_part(self, text: str, *, final: bool, tenant: str = "") -> "tuple[array[int], int]":
        """Whatever comes after the last newline may change."""
        cut = len(text) if final else text.rfind("\n") + 1
        return self.encode(text[:cut], allow_special=True), cut

    def encode_at_once(self, text: str) -> "array[int]":
        return self.encode(text, allow_special=True)

    @property
    def around(self) -> "tuple[array[int], array[int]]":
        return array("I"), array("I")

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool,
                    continue_final_message: bool, chat_template_kwargs: dict[str, Any],
                    tenant: str = "") -> "array[int]":
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        text += "".join(f"[{name}={value}]" for name, value in chat_template_kwargs.items())
        if continue_final_message:
            text = text[:-1]
        return self.encode(text + "<assistant>" * add_generation_prompt, allow_special=False)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


@dataclass(frozen=True, kw_only=True)
class FakeInfo:
    model_name: str = "needle"
    max_model_len: int = 8 << 20
    vocab_size: int = VOCAB_SIZE
    ring_size: int = 2
    version: str = "0.1.0"
    prefix_cache: bool = True
    default_sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.5, "top_k": 7})


class FakeStream:
    def __init__(self, outputs: AsyncIterator[RequestOutput], estimate: Estimate) -> None:
        self._outputs, self.estimate = outputs, estimate

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._outputs

    def __anext__(self) -> Any:
        return self._outputs.__anext__()


class FakeEngine:
    """Answers with the prompt's tokens, over and over, one each `step_s`."""

    def __init__(self, info: FakeInfo | None = None) -> None:
        self.info = info or FakeInfo()
        self.dead: EngineDeadError | None = None
        self.closed = False
        self._death = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        self.admission_s = 0.0
        """How long the engine thinks before it queues a request or tells an estimate."""
        self.refusal: RequestError | None = None
        """What it says then, instead of queueing."""
        self.step_s = 0.0
        self.first_step_s = 0.0
        self.first_token_ms = 7
        """What an estimate says."""
        self.broken = False
        """Raise an error that nobody expects."""
        self.finish_reason: str | None = "length"
        self.asked: list[str] = []
        """Request ids that came, and `estimate` for each estimate that was asked for."""
        self.submitted: list[tuple[str, list[int], SamplingParams]] = []
        self.estimated: list[list[int]] = []
        self.scheduled: list[SchedulingParams] = []
        """Of all that were submitted or estimated."""
        self.withdrawn: list[str] = []
        """What was cancelled while it waited to be queued: taken back by the engine itself."""
        self.cancelled: list[str] = []
        self.live: set[str] = set()
        """What is queued or runs: neither ended nor cancelled."""

    def die(self, rank: int | None) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._die, rank)

    def _die(self, rank: int | None) -> None:
        self.dead = EngineDeadError("secret details of the crash", rank)
        self.live.clear()
        self._death.set()

    async def submit(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams, *,
                     request_id: str, return_progress: bool = False,
                     scheduling: SchedulingParams = NO_WISHES) -> FakeStream:
        self.asked.append(request_id)
        ids, n_output = self._fitting(prompt_token_ids, params)
        await self._admission(request_id)
        self.submitted.append((request_id, ids, params))
        self.scheduled.append(scheduling)
        self.live.add(request_id)
        return FakeStream(self._run(ids, params, n_output, request_id, return_progress), self._estimate(ids, n_output))

    async def estimate(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams,
                       scheduling: SchedulingParams = NO_WISHES) -> Estimate:
        self.asked.append("estimate")
        ids, n_output = self._fitting(prompt_token_ids, params)
        await self._admission("estimate")
        self.estimated.append(ids)
        self.scheduled.append(scheduling)
        return self._estimate(ids, n_output)

    def _estimate(self, ids: list[int], n_output: int) -> Estimate:
        return Estimate(prompt_tokens=len(ids), cached_tokens=len(ids) // 64 * 64, ring_width=self.info.ring_size,
                        kv_bytes=100 * (len(ids) + n_output), queue_ms=None, first_token_ms=self.first_token_ms,
                        queue_position=4)

    async def _admission(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        if self.admission_s:
            try:
                await self._step(self.admission_s)
            except asyncio.CancelledError:
                self.withdrawn.append(name)
                raise
        if self.refusal is not None:
            raise self.refusal

    def _fitting(self, prompt_token_ids: "array[int] | Sequence[int]",
                 params: SamplingParams) -> tuple[list[int], int]:
        if self.dead is not None:
            raise self.dead
        ids = list(prompt_token_ids)
        if not ids:
            raise InvalidValueError("the prompt is empty", "prompt")
        if max(ids) >= self.info.vocab_size:
            raise InvalidValueError("the prompt has a token id outside of the vocabulary", "prompt")
        n_output = params.max_tokens or self.info.max_model_len - len(ids)
        if n_output <= 0 or len(ids) + n_output > self.info.max_model_len:
            raise ContextLengthError(len(ids), n_output, self.info.max_model_len)
        return ids, n_output

    async def _run(self, ids: list[int], params: SamplingParams, n_output: int, request_id: str,
                   return_progress: bool) -> AsyncIterator[RequestOutput]:
        if return_progress:
            for processed in (0, len(ids)):
                yield RequestOutput(request_id=request_id, progress=Progress(
                    total=len(ids), cached=0, processed=processed, time_ms=3,
                    percent=100.0 * processed / len(ids), eta_ms=None, queue_position=0))
        await self._step(self.first_step_s)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        for index in range(n_output):
            await self._step(self.step_s)
            if self.broken:
                self.live.discard(request_id)
                raise ZeroDivisionError("secret of the implementation")
            token = ids[index % len(ids)]
            last = index == n_output - 1
            new = decoder.decode(bytes([token]) if token < 256 else b"", final=last)
            text += new
            stopped = next((stop for stop in params.stop if stop in text), None)
            finish = "stop" if stopped else self.finish_reason if last else None
            if finish:
                self.live.discard(request_id)
            yield RequestOutput(
                request_id=request_id, text=new, token_ids=[token], finish_reason=finish, stop_reason=stopped,
                logprobs=[] if params.logprobs is None else [
                    TokenLogprob(token, -0.25,
                                 [(token, -0.25), (1, -math.inf), (2, math.nan)][:params.logprobs])],
                usage=Usage(prompt_tokens=len(ids), completion_tokens=index + 1,
                            cached_tokens=3) if finish else None)
            if finish:
                return

    async def _step(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._death.wait()
        except TimeoutError:
            return
        assert self.dead is not None
        raise self.dead

    async def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self.live.discard(request_id)

    async def close(self) -> None:
        self.closed = True

    async def died(self) -> EngineDeadError:
        self._loop = asyncio.get_running_loop()
        await self._death.wait()
        assert self.dead is not None
        return self.dead
