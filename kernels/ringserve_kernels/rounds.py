"""Rounds: exchanges of the ring one after the other, the next in flight while what came in is worked on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ringserve_kernels.ring import Ring, Ticket


@dataclass(frozen=True, slots=True)
class Message:
    """One exchange as the ring sees it: the arguments of `Ring.post`."""

    shift: int
    send_bytes: int
    fill: Callable[[Tensor], None]
    receive_bytes: int


class Rounds:
    """Exchanges in order, each posted before the one before it is waited for; iterates over what came in.

    A rank leaves out the exchanges in which it neither sends nor receives; the others stand in the same order on
    all ranks. Then none waits for ever: whoever waits, waits for a peer that is at an earlier exchange.
    A message is released when the next is asked for, so in `zip` the rounds stand first.
    """

    def __init__(self, ring: Ring, messages: Sequence[Message]) -> None:
        self._ring = ring
        self._messages = messages
        self._posted: list[Ticket] = []

    def post_next(self) -> None:
        if len(self._posted) < len(self._messages):
            m = self._messages[len(self._posted)]
            self._posted.append(self._ring.post(m.shift, m.send_bytes, m.fill, m.receive_bytes))

    def __iter__(self) -> Iterator[Tensor]:
        if not self._posted:
            self.post_next()
        for i in range(len(self._messages)):
            self.post_next()
            ticket = self._posted[i]
            yield self._ring.wait(ticket)
            self._ring.release(ticket)
