"""Ranks on CUDA devices of one host through symmetric memory: messages are copied between the devices by their copy
engines, on a stream of its own, while the attention keeps the multiprocessors.

Written without GPUs at hand: its order of signals, copies and waits is tested with streams and signals of threads; run
the transport tests on two devices before trusting it. It is used only when it is asked for (`--transport symm`).

    sender, compute stream      wait until consumed (n - 2) · fill outbox · signal ready (n)
    receiver, copy stream       wait until inbox released (n - 2) · wait until ready (n) · copy · signal consumed (n)
    receiver, compute stream    wait until copied (n) · read inbox · mark released (n)

The receiver pulls, so a sender never writes over what is being read. As with NCCL, `wait` makes the stream wait, not
the host. A signal that does not come within the time-out ends the process by a trap on the device; the engine sees a
rank that died.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ringserve.ring.device import DeviceTransport
from ringserve.ring.staging import SLOTS, StagingBuffers
from ringserve.ring.transport import HEADER_BYTES, Exchange

READY: Final = 0
"""First channel, by slot: the sender's outbox holds a message."""
CONSUMED: Final = SLOTS
"""First channel, by slot: the receiver has copied it."""
_ROOM: Final = 256
"""Outboxes begin at a multiple of so many bytes."""


class CopyStream:
    """A stream for copies beside the current one, and marks in both."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], None], after: Any | None) -> Any:
        """Enqueue `work`, behind the mark `after`; returns the mark of its end."""
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            work()
            return self._stream.record_event()

    def mark(self) -> Any:
        """In the current stream, behind all that was enqueued there."""
        return torch.cuda.current_stream().record_event()

    def await_mark(self, mark: Any) -> None:
        """The current stream goes on when the mark has been reached."""
        torch.cuda.current_stream().wait_event(mark)


def open_symmetric(directory: str, *, rank: int, size: int, epoch: int, device: torch.device, n_bytes: int,
                   timeout_s: float) -> Any:
    """`n_bytes` of symmetric memory on every rank: a handle with `get_buffer`, `put_signal` and `wait_signal`.
    Collective; the ranks meet in a file."""
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory as symmetric

    name = f"ringserve-epoch-{epoch}"
    store = FileStore(os.path.join(directory, f"symm-epoch-{epoch}"), size)
    store.set_timeout(timedelta(seconds=timeout_s))
    _SymmetricMemory.set_group_info(name, rank, size, store)
    return _SymmetricMemory.rendezvous(symmetric.empty(n_bytes, dtype=torch.uint8, device=device), name)


class SymmetricMemoryTransport(DeviceTransport):
    """One rank's end: an outbox for every (destination, slot) in symmetric memory, inboxes in its own."""

    def __init__(self, directory: str, *, rank: int, size: int, slot_bytes: int, epoch: int, device: torch.device,
                 timeout_s: float, checksums: bool = False) -> None:
        """`directory`: made for this start, private to the user, shared by the ranks; one file per epoch."""
        super().__init__(rank=rank, size=size, epoch=epoch, device=device, checksums=checksums)
        self._timeout_ms = int(timeout_s * 1000)
        self._slot_bytes = slot_bytes
        self._room = -(-(HEADER_BYTES + slot_bytes) // _ROOM) * _ROOM
        self._memory = open_symmetric(directory, rank=rank, size=size, epoch=epoch, device=device,
                                      n_bytes=size * SLOTS * self._room, timeout_s=timeout_s)
        self._copies = CopyStream(device)
        self._incoming = StagingBuffers(device)
        self._sent = [0] * size
        self._received = [0] * size
        self._copied: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        """By (source, sequence): the mark behind the copy, and its inbox."""
        self._released: dict[tuple[int, int], Any] = {}
        """By (source, slot): the mark behind the last read of the inbox."""

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        assert 0 < n_bytes <= self._slot_bytes, (
            f"a message of {n_bytes} bytes to rank {destination} does not fit a slot of {self._slot_bytes}")
        sequence = self._sent[destination]
        if sequence >= SLOTS:
            self._memory.wait_signal(destination, CONSUMED + sequence % SLOTS, self._timeout_ms)
        return self._outbox(self.rank, destination, sequence, n_bytes)[HEADER_BYTES:]

    def post(self, exchange: Exchange) -> None:
        if exchange.send_bytes:
            destination = exchange.destination
            sequence = self._sent[destination]
            self._seal(self._outbox(self.rank, destination, sequence, exchange.send_bytes), sequence)
            self._memory.put_signal(destination, READY + sequence % SLOTS, self._timeout_ms)
            self._sent[destination] = sequence + 1
        if exchange.receive_bytes:
            exchange.sequence = self._received[exchange.source]
            self._pull(exchange.source, exchange.sequence, exchange.receive_bytes)
            self._received[exchange.source] += 1

    def wait(self, exchange: Exchange) -> Tensor:
        mark, inbox = self._copied.pop((exchange.source, exchange.sequence))
        self._copies.await_mark(mark)
        return self._opened(inbox, exchange.source, exchange.sequence)

    def release(self, exchange: Exchange) -> None:
        self._released[exchange.source, exchange.sequence % SLOTS] = self._copies.mark()

    def abort(self) -> None:
        """Nothing reaches a peer's stream that waits: it ends by its time-out, or with its process."""

    def close(self) -> None:
        self._copied.clear()
        self._released.clear()
        self._memory = None

    def _pull(self, source: int, sequence: int, n_bytes: int) -> None:
        memory, slot = self._memory, sequence % SLOTS
        theirs = self._outbox(source, self.rank, sequence, n_bytes)
        inbox = self._incoming.take(source, sequence, n_bytes)

        def copy() -> None:
            memory.wait_signal(source, READY + slot, self._timeout_ms)
            inbox.copy_(theirs, non_blocking=True)
            memory.put_signal(source, CONSUMED + slot, self._timeout_ms)

        released = self._released.pop((source, slot), None)
        assert released is not None or sequence < SLOTS, (
            f"message {sequence} of rank {source} is expected before message {sequence - SLOTS} was released")
        mark = self._copies.run(copy, released)
        self._copied[source, sequence] = mark, inbox

    def _outbox(self, source: int, destination: int, sequence: int, n_bytes: int) -> Tensor:
        """Header and payload of a message, in the memory of its sender: uint8 [HEADER_BYTES + n_bytes]."""
        start = (destination * SLOTS + sequence % SLOTS) * self._room
        outbox: Tensor = self._memory.get_buffer(source, (HEADER_BYTES + n_bytes,), torch.uint8, start)
        return outbox
