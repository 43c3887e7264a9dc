"""An event loop on a thread of its own, for callers that have none."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from ringserve.client.errors import closed

T = TypeVar("T")

SETTLE_S = 10.0


class LoopThread:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ringserve client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Wait for `work`, which has time-outs of its own where it needs them."""
        if self._loop.is_closed():
            work.close()
            raise closed()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def iterate(self, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """The same events. Closing the iterator closes them."""
        one_at_a_time = asyncio.Lock()

        async def following() -> T | None:
            async with one_at_a_time:
                return await anext(events, None)

        async def finish() -> None:
            # An interrupted `following` may still be on its way out.
            async with one_at_a_time:
                await events.aclose()

        try:
            while (event := self.run(following())) is not None:
                yield event
        finally:
            self.finish(finish())

    def close(self) -> None:
        if threading.current_thread() is self._thread:
            # The loop dropped the last reference; it cannot wait for its own end.
            threading.Thread(target=self.close, name="ringserve client end").start()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(SETTLE_S)
            if not self._thread.is_alive():
                self._loop.close()

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        if self._loop.is_closed():
            work.close()
        elif threading.current_thread() is self._thread:
            asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            with contextlib.suppress(FutureTimeoutError):
                self.run(work, SETTLE_S)
