"""The ring as the kernels see it: something that moves bytes between ranks, one shift at a time."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Ticket(Protocol):
    """An exchange in flight: what `post` returned, for `wait` and `release`."""


class Ring(Protocol):
    """A communicator that knows no attention. All ranks post the same exchanges in the same order.

    Exchange with `shift` h: this rank's message goes to rank (rank + h) % size, and one comes in from rank
    (rank - h) % size. Either may be absent (0 bytes) if both sides know it. At most two exchanges are open
    (posted and not released) at a time.
    """

    rank: int
    size: int

    def post(self, shift: int, send_bytes: int, fill: Callable[[Tensor], None], receive_bytes: int) -> Ticket:
        """Start an exchange. `fill` writes the message into a uint8 buffer [send_bytes] of the transport's,
        so that shared memory needs no copy; it is called before `post` returns, not at all for 0 bytes."""
        ...

    def wait(self, ticket: Ticket) -> Tensor:
        """The message that came in, uint8 [receive_bytes], valid until `release`.

        Raises the ring's own time-out or abort error when the peer does not send."""
        ...

    def release(self, ticket: Ticket) -> None:
        """The message was waited for and read: its slot may be overwritten. Every ticket is released."""
        ...
