"""Session: one request from its Open to its last event, whether its client is connected or not."""

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Literal

import msgspec

from ringserve.errors import EngineError
from ringserve.outputs import Estimate, Progress
from ringserve.v1 import inference_pb2 as pb
from ringserve_api.errors import ApiError, is_expected
from ringserve_api.generation import Generation, Stopped, cancelled
from ringserve_api.prepare import Prepared, little_endian
from ringserve_api.rpc import messages
from ringserve_api.rpc.early_prefill import EarlyPrefill
from ringserve_api.rpc.event_log import EventLog
from ringserve_api.rpc.upload import Upload
from ringserve_api.state import ServerState

Check = asyncio.Task["array[int] | None"]
"""Finds the ids that a prompt should have had, if those of its parts are not they."""
Phase = Literal["upload", "prefill", "decode", "finished"]

logger = logging.getLogger("ringserve.api")


class Session:
    def __init__(self, state: ServerState, request_id: str, engine_id: str, prepared: Prepared, upload: Upload | None,
                 keep_s: float, deadline_s: float | None, announced_tokens: int = 0) -> None:
        """`engine_id`: its name in the engine, which no client chooses. `announced_tokens`: of the prompt that comes, 0
        when they are not known. Raises what `state.open_request` does."""
        self.request_id, self.tenant = request_id, prepared.scheduling.tenant
        self.upload = upload
        self.events = EventLog()
        self.phase: Phase = "upload" if upload is not None else "prefill"
        self.output_tokens = 0
        self.began = time.monotonic()
        self._state, self._engine_id, self._prepared = state, engine_id, prepared
        self._deadline_s, self._announced_tokens = deadline_s, announced_tokens
        self.keep_s = keep_s
        """How long it lives without a client."""
        self._readers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._forgotten = False
        self._feeder: asyncio.Task[None] | None = None
        self._unfed: asyncio.TimerHandle | None = None
        self._open = contextlib.ExitStack()
        stopped = self._open.enter_context(state.open_request())
        stopped.add_done_callback(self._on_stopped)
        self._task = asyncio.create_task(self._live(stopped))
        # And not in a `finally` of its own: a task that is cancelled before its first step never gets there.
        self._task.add_done_callback(self._ended)
        self.on_forgotten: Callable[[], None] = lambda: None
        """Called when nobody can come back to it any more."""

    # Readers

    @property
    def is_attached(self) -> bool:
        return self._readers > 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """A client is connected. When the last one goes, the request lives on for as long as was asked for."""
        self._readers += 1
        self._stop_timer()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers and not self._forgotten:
                self._timer = asyncio.get_running_loop().call_later(self.keep_s, self.forget)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @contextlib.asynccontextmanager
    async def fed(self, feed: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """The prompt comes from this connection now. Whoever fed it before is stopped: a connection that was lost may
        be the last to know. It may go on reading, so when nobody feeds, no reader keeps the request waiting."""
        if self._feeder is not None:
            self._feeder.cancel()
        if self._unfed is not None:
            self._unfed.cancel()
        feeder = self._feeder = asyncio.create_task(feed)
        try:
            yield
        finally:
            if feeder is self._feeder:
                self._unfed = asyncio.get_running_loop().call_later(self.keep_s, self._starve)
            await cancelled(feeder)

    def _starve(self) -> None:
        if self.phase == "upload":
            self.fail(ApiError("body_idle_timeout", f"the prompt stopped arriving for {self.keep_s:g} s"))

    def forget(self) -> None:
        """End it, if it has not ended, and give up its events."""
        self._forgotten = True
        self._stop_timer()
        self.fail(ApiError("cancelled", "the request was cancelled"))
        self.on_forgotten()

    def fail(self, error: Exception) -> None:
        if not self.events.ended:
            self.events.end(told(error, self._engine_id))
            self._task.cancel()

    def _on_stopped(self, stopped: Stopped) -> None:
        """The server ends the request."""
        if not stopped.cancelled() and (error := stopped.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else EngineError(str(error)))

    async def close(self) -> None:
        """`forget`, and return when nothing of it is left."""
        self.forget()
        await cancelled(self._task)

    # Life

    async def _live(self, stopped: Stopped) -> None:
        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                await self._serve(stopped)
            self.events.end()
        except Exception as error:
            late = ApiError("deadline_exceeded", "the request did not end within its deadline of "
                            f"{self._deadline_s:g} s") if limit.expired() else None
            self.events.end(late or told(error, self._engine_id))

    def _ended(self, _: "asyncio.Task[None]") -> None:
        self.phase = "finished"
        if self.upload is not None:
            self.upload.release()
        self._open.close()

    async def _serve(self, stopped: Stopped) -> None:
        if self.upload is None:
            await self._answer(self._prepared, stopped)
            return
        await self._foresee()
        early: EarlyPrefill | None = None
        if self._state.engine.info.prefix_cache:
            early = EarlyPrefill(self._state.engine, self.upload, self._prepared, self._engine_id, stopped, self._tell)
        try:
            await self.upload.committed.wait()
            self.phase = "prefill"
            await self.upload.finish()
        finally:
            # Before the real request comes, and between two steps: what was computed is there, and it has the ring for
            # itself.
            if early is not None:
                await early.stop()
        check = asyncio.create_task(self.upload.tokenized_at_once())
        try:
            await self._answer(self._with(self.upload.ids), stopped, check)
            if (whole := await check) is not None:
                await self._answer(self._with(whole), stopped)
        finally:
            await cancelled(check)

    async def _foresee(self) -> None:
        """Before the prompt comes: what would become of one of its length of which nothing is computed yet."""
        if self._announced_tokens:
            prepared = messages.unknown_prompt(
                self._prepared, self._announced_tokens, self._state.model.max_model_len)
            self._admit(await self._state.engine.estimate(
                prepared.prompt_token_ids, prepared.params, prepared.scheduling))

    def _admit(self, estimate: Estimate) -> None:
        """Tell what is known; raises ApiError when the first token would come too late."""
        messages.check_in_time(estimate, self._deadline_s, self.began)
        self.events.add(pb.Event(estimated=messages.estimated(estimate)))

    def _with(self, ids: "array[int]") -> Prepared:
        return msgspec.structs.replace(self._prepared, prompt_ids=little_endian(ids))

    async def _answer(self, prepared: Prepared, stopped: Stopped, check: Check | None = None) -> None:
        """Run the request to its end. Without a word of its answer when `check` finds that it has other tokens."""
        async with Generation(self._state.engine, prepared, self._engine_id, stopped) as generation:
            estimate = await generation.submit()
            if estimate is not None:
                self._admit(estimate)
            async for output in generation.outputs():
                if output.progress is not None:
                    self._tell(output.progress)
                if (output.token_ids or output.finish_reason) and check is not None and await check is not None:
                    return
                if output.text or output.token_ids:
                    self.phase = "decode"
                    self.output_tokens += len(output.token_ids)
                    self.events.add(pb.Event(delta=messages.delta(output, self._state.tokenizer)))
                if output.finish_reason is not None:
                    self.events.add(pb.Event(finished=messages.finished(output)))

    def _tell(self, progress: Progress) -> None:
        self.events.tell(messages.snapshot(progress))


def told(error: Exception, engine_id: str) -> Exception:
    """What readers get for it. What nobody expected is logged, once for all of them."""
    if is_expected(error):
        return error
    logger.error("request %s failed", engine_id, exc_info=error)
    return ApiError("internal_error", "the server failed on this request")

