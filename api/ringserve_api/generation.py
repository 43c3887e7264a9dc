"""Generation: the life of one request inside of the engine. It is left exactly once, whatever happens."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from ringserve.errors import EngineError, RequestError
from ringserve.outputs import RequestOutput
from ringserve_api.engine_port import Engine
from ringserve_api.errors import ClientDisconnected
from ringserve_api.prepare import Prepared

T = TypeVar("T")


class Generation:
    """Submits `prepared` to the engine; raises what the engine refuses it with."""

    def __init__(self, engine: Engine, prepared: Prepared, request_id: str) -> None:
        self.request_id = request_id
        self.finished = False
        """The engine has done with the request, in whichever way."""
        self._engine = engine
        try:
            self._outputs = engine.submit(prepared.prompt_token_ids, prepared.params, request_id=request_id,
                                          return_progress=prepared.return_progress)
        except RequestError as error:
            # The engine calls its input the prompt; a chat client sent messages.
            if prepared.kind == "chat" and error.param == "prompt":
                error.param = "messages"
            raise
        self._pending: asyncio.Task[RequestOutput | None] | None = None
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

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

    async def _advance(self) -> RequestOutput | None:
        try:
            output = await anext(self._outputs, None)
        except Exception:
            self.finished = True
            raise
        self.finished = output is None or output.finish_reason is not None
        return output

    def stop(self, error: Exception) -> None:
        """Make the request end with `error`, if it has not ended."""
        if not self._stopped.done():
            self._stopped.set_exception(error)
            self._stopped.exception()  # seen: a request that never asks again is no forgotten error

    async def leave(self) -> None:
        """Let the engine go on without this request."""
        if self._pending is not None:
            await cancelled(self._pending)
            self._pending = None
        if isinstance(self._outputs, AsyncGenerator):
            await self._outputs.aclose()
        if not self.finished:
            self.finished = True
            await self._engine.cancel(self.request_id)


async def cancelled(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel `tasks` and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it and raise ClientDisconnected when the client goes first."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        with contextlib.suppress(Exception):
            await cancelled(working, gone)
