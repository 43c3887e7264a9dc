"""An event loop on a thread of its own, for callers that have none.

One for the process, which ends with it: grpc.aio hands the events of all loops through any one of them, and stumbles
where another loop was closed meanwhile.
"""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

T = TypeVar("T")

SETTLE_S = 10.0


class LoopThread:
    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ringserve client", daemon=True)
        self._thread.start()
        # When the interpreter ends, after the clients, which were made later.
        weakref.finalize(self, _stop, self._loop, self._thread)

    @classmethod
    def of_process(cls) -> "LoopThread":
        global _shared
        with _lock:
            # A fork has no threads.
            if _shared is None or not _shared._thread.is_alive():
                _shared = cls()
            return _shared

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Wait for `work`, which has time-outs of its own where it needs them."""
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

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for the end of something, but not for ever."""
        if not self._thread.is_alive():
            work.close()
        elif threading.current_thread() is self._thread:
            # The loop dropped the last reference; it cannot wait for itself.
            asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            with contextlib.suppress(FutureTimeoutError):
                self.run(work, SETTLE_S)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SETTLE_S)


_lock = threading.Lock()
_shared: LoopThread | None = None
