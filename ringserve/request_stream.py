"""RequestStream: what comes of one request, as its reader takes it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ringserve.detokenizer import Detokenizer
from ringserve.errors import EngineError
from ringserve.outputs import Estimate, RequestOutput, TokenLogprob, Usage
from ringserve.updates import RequestUpdate


class RequestStream:
    """Iterates over a request's outputs. What a slow reader has not taken is joined, so it holds no more than
    the answer itself."""

    def __init__(self, request_id: str, prompt_tokens: int, detokenizer: Detokenizer, end_token_ids: Sequence[int],
                 stop: Callable[[], Awaitable[None]]) -> None:
        """`stop` ends the request's work: it is called when a stop string was found, of which the engine knows
        nothing."""
        self._request_id, self._detokenizer = request_id, detokenizer
        self._end_token_ids, self._stop = end_token_ids, stop
        self._prompt_tokens, self._output_tokens, self._cached_tokens = prompt_tokens, 0, 0
        self.estimate: Estimate | None = None
        """What was known when it was queued."""
        self._pending: list[RequestUpdate] = []
        self._arrived = asyncio.Event()
        self._error: EngineError | None = None
        self._finished = False

    def feed(self, update: RequestUpdate) -> None:
        if self._pending and not update.token_ids and not self._pending[-1].token_ids and update.error is None:
            self._pending.pop()
        self._pending.append(update)
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._arrived.set()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            if self._finished:
                raise StopAsyncIteration
            await self._arrived.wait()
            if not self._pending:
                assert self._error is not None
                self._finished = True
                raise self._error
            pending, self._pending = self._pending, []
            if self._error is None:
                self._arrived.clear()
            output = await self._joined(pending)
            self._finished = output.finish_reason is not None
            return output

    async def _joined(self, updates: list[RequestUpdate]) -> RequestOutput:
        if updates[-1].error is not None:
            self._finished = True
            raise EngineError(updates[-1].error)
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        text = ""
        reason: str | None = None
        stop_reason: str | int | None = None
        usage: Usage | None = None
        for update in updates:
            self._cached_tokens = max(self._cached_tokens, update.cached_tokens)
            # The token that ended the answer is not part of its text.
            shown = update.token_ids[:-1] if update.finish_reason == "stop" else update.token_ids
            before = self._detokenizer.count
            text += self._detokenizer.add(shown)
            if self._detokenizer.stop is None and update.finish_reason is not None:
                text += self._detokenizer.finish()
                reason, usage = update.finish_reason, update.usage
                if update.stop_token_id not in self._end_token_ids:
                    stop_reason = update.stop_token_id
            taken = update.token_ids
            if self._detokenizer.stop is not None:
                # The engine does not know text: what it gave beyond the stop string is not part of the answer.
                reason, stop_reason = "stop", self._detokenizer.stop
                taken = update.token_ids[:self._detokenizer.count - before]
            token_ids += taken
            logprobs += update.logprobs[:len(taken)]
            if reason is not None:
                break
        self._output_tokens += len(token_ids)
        if self._detokenizer.stop is not None:
            usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._output_tokens,
                          cached_tokens=self._cached_tokens)
            await self._stop()
        return RequestOutput(
            request_id=self._request_id, text=text, token_ids=token_ids, logprobs=logprobs,
            progress=next((u.progress for u in reversed(updates) if u.progress is not None), None),
            finish_reason=reason, stop_reason=stop_reason, usage=usage)
