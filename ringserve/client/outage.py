"""The time without a connection: how long to wait before the next attempt, and when to give up."""

import asyncio
import random
import time

from ringserve.client.errors import ClientError, ConnectionLostError

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


class Outage:
    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._since: float | None = None
        self._pause_s = FIRST_PAUSE_S

    @property
    def left_s(self) -> float:
        return self._keep_s if self._since is None else self._since + self._keep_s - time.monotonic()

    def over(self) -> None:
        """There was news: the next outage is a new one. A connection alone is not enough, or a request that breaks
        every connection would never end."""
        self._since = None
        self._pause_s = FIRST_PAUSE_S

    async def wait(self, why: ClientError) -> None:
        """Before the next attempt. Raises ConnectionLostError when there is no time for another one."""
        if self._since is None:
            self._since = time.monotonic()
        if self.left_s <= 0:
            raise ConnectionLostError(f"the connection was lost and not regained within {self._keep_s:g} s: "
                                      f"{why.message}") from why
        # Jitter: the clients of a server that comes back must not come all at once.
        pause = max(self._pause_s * random.uniform(0.5, 1), why.retry_after_s or 0)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        await asyncio.sleep(min(pause, self.left_s))
