"""Generation: the life of one request inside of the engine. It is left exactly once, whatever happens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.types import Receive

from ringserve.errors import EngineError, RequestError
from ringserve.outputs import Estimate, RequestOutput
from ringserve_api.engine_port import Engine, OutputStream
from ringserve_api.errors import ClientDisconnected
from ringserve_api.prepare import Kind, Prepared

T = TypeVar("T")
Stopped = asyncio.Future[None]
"""Of one open request: gets the error with which the server ends it."""


class Generation:
    """Use `async with`; then `submit` and, until the one with a finish reason has come, `next`."""

    def __init__(self, engine: Engine, prepared: Prepared, request_id: str, stopped: Stopped) -> None:
        self.request_id = request_id
        self.finished = False
        """The engine has done with the request, in whichever way."""
        self._engine = engine
        self._prepared = prepared
        self._stopped = stopped
        self._admission: asyncio.Task[OutputStream] | None = None
        self._pending: asyncio.Task[RequestOutput | None] | None = None

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def submit(self) -> Estimate | None:
        """Returns when the engine has queued the request, with what is known of it then; raises what it refuses it
        with."""
        prepared = self._prepared
        self._admission = asyncio.create_task(self._engine.submit(
            prepared.prompt_token_ids, prepared.params, request_id=self.request_id,
            return_progress=prepared.return_progress, scheduling=prepared.scheduling))
        # Not awaited itself: who is cancelled here must not lose a stream that has just been given, see `leave`.
        await asyncio.wait({self._admission})
        with refusals_named_for(prepared.kind):
            return self._admission.result().estimate

    async def next(self, timeout_s: float | None = None) -> RequestOutput | None:
        """The next event, or None after `timeout_s` without one."""
        if self._pending is None:
            self._pending = asyncio.create_task(self._advance())
        either: set[asyncio.Future[Any]] = {self._pending, self._stopped}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._pending.done():
            pending, self._pending = self._pending, None
            output = pending.result()
            if output is None:
                raise EngineError("the engine ended a request without a finish reason")
            return output
        if self._stopped.done():
            self._stopped.result()
        return None

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """All events, for whoever needs no time-out and ends when the server does of its own accord."""
        assert self._admission is not None, "submit comes first"
        while not self.finished:
            output = await self._advance()
            if output is None:
                raise EngineError("the engine ended a request without a finish reason")
            yield output

    async def _advance(self) -> RequestOutput | None:
        assert self._admission is not None, "submit comes first"
        try:
            output = await anext(self._admission.result(), None)
        except Exception:
            self.finished = True
            raise
        self.finished = output is None or output.finish_reason is not None
        return output

    async def leave(self) -> None:
        """Let the engine go on without this request."""
        admission, pending = self._admission, self._pending
        self._admission = self._pending = None
        if admission is not None and not (self.finished and pending is None):
            # To the end: a request that is cancelled once more while it leaves must not stay in the engine.
            await asyncio.shield(self._leave(admission, pending))

    async def _leave(self, admission: "asyncio.Task[OutputStream]",
                     pending: "asyncio.Task[RequestOutput | None] | None") -> None:
        await cancelled(admission, *([pending] if pending is not None else []))
        if admission.cancelled() or admission.exception() is not None:
            return  # the engine never had it, or its submit has taken it back
        if not self.finished:
            self.finished = True
            await self._engine.cancel(self.request_id)


@contextlib.contextmanager
def refusals_named_for(kind: Kind) -> Iterator[None]:
    """The engine calls its input the prompt; a chat client sent messages."""
    try:
        yield
    except RequestError as error:
        if kind == "chat" and error.param == "prompt":
            error.param = "messages"
        raise


async def cancelled(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel `tasks` and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_ended(receive: Receive, stopped: Stopped, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it when the client goes first, and raise ClientDisconnected, or when the server
    ends the request first, and raise its error."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    first: set[asyncio.Future[Any]] = {working, gone, stopped}
    try:
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if stopped.done():
            stopped.result()
        raise ClientDisconnected
    finally:
        with contextlib.suppress(Exception):
            await cancelled(working, gone)
