"""The events of one request, each once and in order, over as many connections as it takes.

    Accepted 1, Estimated 2, Delta 3, (lost; resume after 3), Accepted again, Delta 4, Finished 5
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc

from ringserve.client.calls import Calls
from ringserve.client.errors import ClientError, closed, error_of
from ringserve.client.events import Accepted, Event, Finished, Progress, Queued, event_of
from ringserve.client.outage import LONGEST_PAUSE_S, Outage
from ringserve.v1 import inference_pb2 as pb

END_TIMEOUT_S = 1.0
"""For the status that follows the last event."""
STEADY_S = LONGEST_PAUSE_S
"""A connection that held for so long was a good one, though nothing new came over it."""
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)


class EventStream:
    def __init__(self, calls: Calls, keep_s: float, cancel: Callable[[str], Awaitable[None]]) -> None:
        self._calls = calls
        self._cancel = cancel
        self._outage = Outage(keep_s)
        self._call: Any = None
        self._begun_at = 0.0
        self._greeted = False
        """Something came over this call."""
        self._resuming = False
        self._after = 0
        """The last numbered event that was seen."""
        self._received_bytes = 0
        self._processed_tokens = 0
        self._over = False
        """The server is done with the request."""
        self._ended = False

    async def events(self) -> AsyncGenerator[Event, None]:
        """Raises ClientError. Leaving it early cancels the request."""
        try:
            while not self._over:
                self._dial()
                while not isinstance(came := await self._read(), ClientError):
                    event = self._take(came)
                    if event is not None:
                        yield event
                await self._hang_up()
                if not self._over:
                    await self._recover(came)
        finally:
            await self.end()

    async def end(self) -> None:
        """Cancel the request where it is not over. With `keep`, a dropped connection alone would not."""
        if not self._ended:
            self._ended = True
            try:
                # First: a stream that is hung up would leave the server to wait for us.
                if not self._over and self._call is not None:
                    await self._cancel(self._calls.request_id)
            finally:
                await self._hang_up()

    def _dial(self) -> None:
        self._begun_at, self._greeted = time.monotonic(), False
        self._call = self._calls.resume(self._after) if self._resuming else self._calls.begin()

    async def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()
            await self._calls.stop()

    # Reading

    async def _read(self) -> pb.Event | ClientError:
        """The next event, or how the call ended."""
        try:
            async with asyncio.timeout(self._patience_s()):
                message = await self._call.read()
        except grpc.aio.AioRpcError as failed:
            return error_of(failed)
        except TimeoutError:
            return _lost("the server did not answer")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # It was the call that was cancelled, by this client.
            if self._calls.failure is not None:
                raise self._calls.failure from None
            if self._ended:
                raise closed() from None
            return _lost("the connection took no more messages")
        if message is grpc.aio.EOF:
            return _lost("the stream ended before the request did")
        event: pb.Event = message.event
        return event

    def _patience_s(self) -> float | None:
        if self._over:
            return END_TIMEOUT_S  # The call should end in order, rather than be cancelled by us.
        if self._resuming and self._calls.greets and not self._greeted:
            return max(self._outage.left_s, END_TIMEOUT_S)
        return None  # A prefill may take hours; keep-alive finds a server that is gone.

    def _take(self, numbered: pb.Event) -> Event | None:
        """What is new in it."""
        self._greeted = True
        event = event_of(numbered)
        if event is not None:
            self._calls.saw(event)
        if isinstance(event, Queued):
            return event
        if isinstance(event, Progress):
            self._note(event.processed_tokens > self._processed_tokens)
            self._processed_tokens = max(event.processed_tokens, self._processed_tokens)
            return event
        if isinstance(event, Accepted):
            first = self._after == 0
            self._note(first or event.received_bytes > self._received_bytes)
            # It is the first event, whatever number it has when it is repeated.
            self._after = max(self._after, 1)
            self._received_bytes = max(event.received_bytes, self._received_bytes)
            return event if first else None
        if numbered.sequence <= self._after:
            return None
        self._after = numbered.sequence
        self._note(True)
        self._over = isinstance(event, Finished)
        return event

    def _note(self, news: bool) -> None:
        if news:
            self._outage.over()

    # Recovery

    async def _recover(self, lost: ClientError) -> None:
        """Returns when it is time for another call. Raises ClientError when there is no sense in one."""
        if self._ended:
            raise closed()
        if self._resuming and self._after == 0 and lost.status is grpc.StatusCode.NOT_FOUND:
            # The request never arrived.
            self._resuming = False
            return
        if not self._may_come_back(lost):
            self._over = True
            raise lost
        if self._greeted and time.monotonic() - self._begun_at > STEADY_S:
            self._outage.over()
        await self._outage.wait(lost)
        self._resuming = True

    def _may_come_back(self, lost: ClientError) -> bool:
        if lost.from_server:
            # Busy, or on its way out: of a request that it has, it says so for the moment only.
            return lost.status is grpc.StatusCode.UNAVAILABLE and lost.retry_after_s is not None and self._after > 0
        return lost.status in LOST or (lost.status is grpc.StatusCode.INTERNAL and "RST_STREAM" in lost.message)


def _lost(message: str) -> ClientError:
    return ClientError(message, code="connection_lost", status=grpc.StatusCode.UNAVAILABLE)
