"""The ring of one rank, as the kernels see it: exchanges by shift, over whichever transport carries them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import torch
from ringserve_kernels.ring import Ring, Ticket
from torch import Tensor

from ringserve.ring.transport import Exchange, RingProtocolError, Transport

MAX_OPEN: Final = 2
"""Exchanges that may be posted and not released: a transport has two slots per pair."""


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """What a rank moved since the last reset. Bytes are payload: headers are not counted."""

    sent_bytes: tuple[int, ...]
    """By destination rank."""
    received_bytes: tuple[int, ...]
    """By source rank."""
    sent_messages: int
    received_messages: int
    packing_s: float
    """Seconds spent filling and posting messages."""
    wait_s: float
    """Seconds spent waiting: for messages, and for slots that a peer had not read yet."""


class _WaitClock:
    """Adds up the seconds inside `with clock.waiting(peer)`, and knows the peer meanwhile."""

    def __init__(self) -> None:
        self.peer: int | None = None
        self.seconds = 0.0
        self._started = 0.0

    def waiting(self, peer: int) -> Self:
        self.peer = peer
        return self

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._started
        self.peer = None


class RingGroup(Ring):
    """Implements the kernels' `Ring` for one epoch. Used by one thread, but for `waiting_for`.

    A ring of one rank has no transport, and no exchange in it carries bytes.
    """

    def __init__(self, transport: Transport | None) -> None:
        self.rank = transport.rank if transport is not None else 0
        self.size = transport.size if transport is not None else 1
        self._transport = transport
        self._clock = _WaitClock()
        self._step = -1
        self._open: list[Exchange] = []
        self._nothing = torch.empty(0, dtype=torch.uint8, device=transport.device if transport else "cpu")
        self.reset_statistics()

    @property
    def waiting_for(self) -> int | None:
        """The peer this rank waits for right now; a heartbeat thread may read it."""
        return self._clock.peer

    def begin_step(self, step: int, epoch: int) -> None:
        """All exchanges that follow belong to `step`; a message of another step is an error."""
        assert not self._open, f"rank {self.rank} begins step {step} with {len(self._open)} exchanges open"
        self._step = step
        if self._transport is None:
            return
        if epoch != self._transport.epoch:
            raise RingProtocolError(f"rank {self.rank} is to run step {step} of epoch {epoch}, its ring is "
                                    f"of epoch {self._transport.epoch}")
        self._transport.begin_step(step)

    def post(self, shift: int, send_bytes: int, fill: Callable[[Tensor], None], receive_bytes: int) -> Ticket:
        assert self._step >= 0, f"rank {self.rank} posts an exchange before its first step began"
        assert send_bytes >= 0 and receive_bytes >= 0, f"negative bytes: {send_bytes} out, {receive_bytes} in"
        assert len(self._open) < MAX_OPEN, f"rank {self.rank} posts with {MAX_OPEN} exchanges open"
        exchange = Exchange((self.rank + shift) % self.size, send_bytes, (self.rank - shift) % self.size,
                            receive_bytes)
        if send_bytes or receive_bytes:
            assert exchange.destination != self.rank, (
                f"rank {self.rank} of {self.size} posts {send_bytes} bytes out and {receive_bytes} in "
                f"to itself (shift {shift})")
            self._send(exchange, fill)
        if not receive_bytes:
            exchange.message = self._nothing
        self._open.append(exchange)
        return exchange

    def wait(self, ticket: Ticket) -> Tensor:
        exchange = self._opened(ticket)
        if exchange.message is None:
            with self._clock.waiting(exchange.source):
                exchange.message = self._carrier().wait(exchange)
            self._received_bytes[exchange.source] += exchange.receive_bytes
            self._received_messages += 1
        return exchange.message

    def release(self, ticket: Ticket) -> None:
        exchange = self._opened(ticket)
        assert exchange.message is not None, (
            f"rank {self.rank} releases an exchange with rank {exchange.source} that it has not waited for")
        self._open.remove(exchange)
        exchange.message = None
        if exchange.receive_bytes:
            self._carrier().release(exchange)

    def statistics(self) -> RingStatistics:
        """What was moved since the last reset."""
        return RingStatistics(tuple(self._sent_bytes), tuple(self._received_bytes), self._sent_messages,
                              self._received_messages, self._packing_s, self._clock.seconds)

    def reset_statistics(self) -> None:
        """Count from zero again."""
        self._sent_bytes = [0] * self.size
        self._received_bytes = [0] * self.size
        self._sent_messages = 0
        self._received_messages = 0
        self._packing_s = 0.0
        self._clock.seconds = 0.0

    def abort(self) -> None:
        """This rank cannot go on: free the peers that wait for it, instead of letting them time out."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """End of the epoch: let go of the transport."""
        self._open.clear()
        if self._transport is not None:
            self._transport.close()

    def _send(self, exchange: Exchange, fill: Callable[[Tensor], None]) -> None:
        transport = self._carrier()
        if exchange.send_bytes:
            with self._clock.waiting(exchange.destination):
                buffer = transport.slot(exchange.destination, exchange.send_bytes)
        started = time.monotonic()
        if exchange.send_bytes:
            fill(buffer)
            self._sent_bytes[exchange.destination] += exchange.send_bytes
            self._sent_messages += 1
        transport.post(exchange)
        self._packing_s += time.monotonic() - started

    def _opened(self, ticket: Ticket) -> Exchange:
        assert isinstance(ticket, Exchange) and ticket in self._open, (
            f"rank {self.rank}: {ticket} is not an open exchange of this ring")
        return ticket

    def _carrier(self) -> Transport:
        assert self._transport is not None, "a ring of one rank carries no bytes"
        return self._transport
