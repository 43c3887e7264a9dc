"""Ranks over loopback sockets through gloo: where shared memory does not work, at start-up, and in tests.

About ten times the latency of shared memory, and a rank inside a gloo wait cannot be interrupted: it comes
free when its peer sends, closes or dies, or when the time-out is over (which closes the pair for good: a new
epoch needs a new transport). The ranks find each other through files in a private directory, never through a
TCPStore, which would listen on every interface; gloo itself listens on 127.0.0.1 only, without a secret, so
every user of this host can reach it: one more reason to prefer shared memory.
"""

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo, Work  # type: ignore[attr-defined]

from ringserve.errors import RingTimeoutError
from ringserve.ring.staging import SLOTS, StagingBuffers, size_class
from ringserve.ring.transport import HEADER_BYTES, Exchange, Framing, RingAbortedError, host_bytes

_U32 = 0xFFFFFFFF


class GlooTransport:
    """One rank's end of a gloo mesh. The constructor waits until all ranks of the epoch are there."""

    def __init__(self, directory: str, *, rank: int, size: int, epoch: int, timeout_s: float,
                 checksums: bool = False) -> None:
        """`directory`: made for this start, private to the user, shared by the ranks; one file per epoch."""
        self.rank = rank
        self.size = size
        self.epoch = epoch
        self.device = torch.device("cpu")
        self._timeout_s = timeout_s
        self._framing = Framing(rank, epoch, checksums)
        self._outgoing = StagingBuffers(self.device)
        self._incoming = StagingBuffers(self.device)
        self._sent = [0] * size
        self._received = [0] * size
        self._sending: dict[tuple[int, int], Work] = {}
        self._receiving: dict[tuple[int, int], tuple[Work, Tensor]] = {}
        self._group: Any = self._connect(os.path.join(directory, f"gloo-epoch-{epoch}"))

    def _connect(self, path: str) -> ProcessGroupGloo:
        # torch's type stub names neither the class of the options nor the constructor that takes them.
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=self._timeout_s)
        try:
            return ProcessGroupGloo(FileStore(path, self.size), self.rank, self.size, options)
        except RuntimeError as error:
            raise RingTimeoutError(f"rank {self.rank} did not find the {self.size} ranks of epoch "
                                   f"{self.epoch} within {self._timeout_s:g} s: {error}") from error

    def begin_step(self, step: int) -> None:
        self._framing.begin_step(step)

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        sequence = self._sent[destination]
        previous = self._sending.pop((destination, sequence % SLOTS), None)
        if previous is not None:
            self._finish(previous, destination,
                         f"did not take message {sequence - SLOTS} of rank {self.rank}")
        return self._outgoing.take(destination, sequence, n_bytes)[HEADER_BYTES:]

    def post(self, exchange: Exchange) -> None:
        # The tag is the size class: gloo ends the whole process when a message is longer than the buffer it
        # comes into. With equal tags the buffer is large enough or the header tells; with others, the wait
        # times out.
        if exchange.receive_bytes:
            source = exchange.source
            exchange.sequence = self._received[source]
            # All of the size class, so that a longer message of the class is received and then refused.
            buffer = self._incoming.take(source, exchange.sequence, 2 ** size_class(exchange.receive_bytes))
            work = self._start(source, exchange.receive_bytes, buffer, receive=True)
            self._receiving[source, exchange.sequence] = work, buffer
            self._received[source] += 1
        if exchange.send_bytes:
            destination = exchange.destination
            sequence = self._sent[destination]
            buffer = self._outgoing.take(destination, sequence, exchange.send_bytes)
            self._framing.write(host_bytes(buffer), 0, sequence & _U32, buffer[HEADER_BYTES:])
            work = self._start(destination, exchange.send_bytes, buffer)
            self._sending[destination, sequence % SLOTS] = work
            self._sent[destination] = sequence + 1

    def wait(self, exchange: Exchange) -> Tensor:
        source, sequence = exchange.source, exchange.sequence
        work, buffer = self._receiving.pop((source, sequence))
        self._finish(work, source, f"did not send message {sequence} to rank {self.rank}")
        message = buffer[HEADER_BYTES:HEADER_BYTES + exchange.receive_bytes]
        self._framing.verify(host_bytes(buffer), 0, source, sequence & _U32, message)
        return message

    def release(self, exchange: Exchange) -> None:
        """Nothing to do: the next message into this buffer is only expected from the next `post` on."""

    def abort(self) -> None:
        self.close()  # closed connections end the waits of the peers at once

    def close(self) -> None:
        self._sending.clear()
        self._receiving.clear()
        self._group = None

    def _start(self, peer: int, n_bytes: int, buffer: Tensor, receive: bool = False) -> Work:
        if self._group is None:
            raise RingAbortedError(f"rank {self.rank} has left the ring")
        begin = self._group.recv if receive else self._group.send  # not in torch's type stub
        try:
            work: Work = begin([buffer], peer, size_class(n_bytes))
            return work
        except RuntimeError as error:  # the pair was closed, by a time-out or because the peer is gone
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> RingAbortedError:
        return RingAbortedError(f"rank {self.rank} left step {self._framing.step}: rank {peer} is gone "
                                f"({error})")

    def _finish(self, work: Work, peer: int, lack: str) -> None:
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            if time.monotonic() - started >= self._timeout_s - 0.002:  # gloo counts whole milliseconds
                raise RingTimeoutError(f"rank {peer} {lack} within {self._timeout_s:g} s "
                                       f"(step {self._framing.step})", peer) from error
            raise self._lost(peer, error) from error
