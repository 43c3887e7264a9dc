"""EventLog: what happened to a request, for readers who come and go."""

import asyncio
from collections.abc import AsyncIterator

from ringserve.errors import InvalidValueError
from ringserve.v1 import inference_pb2 as pb


class EventLog:
    """Numbered events are kept as long as the request is; of the others the newest. A reader that is slow holds up
    nobody: it finds what there is when it comes."""

    def __init__(self) -> None:
        self._numbered: list[pb.Event] = []
        self._snapshot: pb.Event | None = None
        self._error: Exception | None = None
        self._ended = False
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def ended(self) -> bool:
        return self._ended

    def __len__(self) -> int:
        return len(self._numbered)

    def add(self, event: pb.Event) -> None:
        """Number an event."""
        self._numbered.append(event)
        event.sequence = len(self._numbered)
        self._snapshot = None
        self._wake()

    def tell(self, event: pb.Event) -> None:
        """How things stand: replaces what was told before."""
        event.sequence = len(self._numbered)
        self._snapshot = event
        self._wake()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more comes; with an error each reader gets it in the end."""
        if not self._ended:
            self._ended, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def check(self, after: int) -> None:
        """Raises InvalidValueError for a number that no event had."""
        if after > len(self._numbered):
            raise InvalidValueError(f"after_sequence is {after}, but only {len(self._numbered)} events have happened",
                                    "after_sequence")

    async def read(self, after: int) -> AsyncIterator[pb.Event]:
        """The events after this number, then those that come; raises what the request ended with, and what
        `check` raises."""
        self.check(after)
        told: pb.Event | None = None
        while True:
            while after < len(self._numbered):
                after += 1
                yield self._numbered[after - 1]
            if self._snapshot is not None and self._snapshot is not told:
                told = self._snapshot
                yield told
            elif self._ended:
                if self._error is not None:
                    raise self._error.with_traceback(None)  # or it would grow with each reader
                return
            elif after == len(self._numbered):
                changed = asyncio.get_running_loop().create_future()
                self._waiting.append(changed)
                await changed
