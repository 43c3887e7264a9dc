"""Ranks of one host over shared memory: a message is written once, where its receiver reads it.

Each slot has two counters: how often it was filled (the sender's) and how often it was emptied (the
receiver's). The sender waits for `freed`, fills, writes the header, counts `filled` up and wakes; the
receiver waits for `filled`, reads, counts `freed` up and wakes. See `region.py` for the layout.

A wait first spins for about 30 us (not when ranks outnumber cores: there the peer needs the core), then
sleeps on a futex in slices of at most 50 ms; each looks at the abort word, the epoch word and the time-out.
Linux on x86_64 only: the order of the stores is the processor's.
"""

import mmap
import os
import threading
import time
from typing import Final

import torch
from torch import Tensor

from ringserve.errors import RingTimeoutError
from ringserve.ring.futex import futex_wait, futex_wake
from ringserve.ring.region import (
    ABORT_WORD,
    ABORTED_BY_PARENT,
    ABORTED_BY_RANK,
    EPOCH_WORD,
    FREED_OFFSET,
    HEADER_OFFSET,
    MAGIC_WORD,
    REGION_MAGIC,
    SIZE_WORD,
    SLOTS,
    abort_region,
    abort_waits,
    control_bytes,
    control_offset,
    create_region,
    pair_index,
    payload_offset,
    region_bytes,
    require_shared_memory_support,
    reset_region,
)
from ringserve.ring.transport import Exchange, Framing, RingAbortedError, RingProtocolError

__all__ = ["SharedMemoryTransport", "abort_region", "create_region", "region_bytes", "reset_region"]

WAIT_SLICE_S: Final = 0.05
SPINS: Final = 1000
"""Looks at a word before sleeping on it: about 30 us, what being woken costs on a virtual machine."""
_U32: Final = 0xFFFFFFFF


class SharedMemoryTransport:
    """One rank's end of a region that the parent created, grown to `region_bytes(size, slot_bytes)`."""

    def __init__(self, fd: int, *, rank: int, size: int, slot_bytes: int, epoch: int, timeout_s: float,
                 checksums: bool = False) -> None:
        require_shared_memory_support()
        assert 0 <= rank < size, f"rank {rank} of a ring of {size}"
        n_bytes, due = os.fstat(fd).st_size, region_bytes(size, slot_bytes)
        if n_bytes != due:
            raise RingProtocolError(f"the shared region has {n_bytes} bytes, {size} ranks with slots of "
                                    f"{slot_bytes} bytes need {due}")
        self.rank = rank
        self.size = size
        self.epoch = epoch
        self.device = torch.device("cpu")
        self._slot_bytes = slot_bytes
        self._timeout_s = timeout_s
        self._framing = Framing(rank, epoch, checksums)
        mapping = mmap.mmap(fd, n_bytes)
        self._control = memoryview(mapping)[:control_bytes(size)]
        self._words = self._control.cast("I")
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._address = self._bytes.data_ptr()
        self._sent = [0] * size
        self._received = [0] * size
        self._spins = SPINS if size <= len(os.sched_getaffinity(0)) else 0
        self._barrier = threading.Lock()
        self._outgoing = [self._places(rank, peer) for peer in range(size)]
        self._incoming = [self._places(peer, rank) for peer in range(size)]
        self._filling = self._bytes[:0]
        words = self._words
        if (words[MAGIC_WORD], words[SIZE_WORD], words[EPOCH_WORD]) != (REGION_MAGIC, size, epoch):
            raise RingProtocolError(f"the shared region is for epoch {words[EPOCH_WORD]} of "
                                    f"{words[SIZE_WORD]} ranks, rank {rank} wants epoch {epoch} of {size}")

    def begin_step(self, step: int) -> None:
        self._check_alive()
        self._framing.begin_step(step)

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        assert 0 < n_bytes <= self._slot_bytes, (
            f"a message of {n_bytes} bytes to rank {destination} does not fit a slot of {self._slot_bytes}")
        sequence = self._sent[destination]
        control, payload = self._outgoing[destination][sequence % SLOTS]
        # Free for message n once the slot's n // 2 messages before it have been read.
        self._await(control + FREED_OFFSET, sequence // SLOTS & _U32, destination,
                    f"did not take message {sequence - SLOTS} of rank {self.rank}")
        self._filling = self._bytes[payload:payload + n_bytes]
        return self._filling

    def post(self, exchange: Exchange) -> None:
        if exchange.send_bytes:
            destination = exchange.destination
            sequence = self._sent[destination]
            control, _ = self._outgoing[destination][sequence % SLOTS]
            self._framing.write(self._control, control + HEADER_OFFSET, sequence & _U32, self._filling)
            # Copies of large messages may use streaming stores, which are not ordered. Taking a lock is a
            # locked instruction: it drains them, so that the counter is seen after the payload.
            with self._barrier:
                self._words[control // 4] = sequence // SLOTS + 1 & _U32
            futex_wake(self._address + control)
            self._sent[destination] = sequence + 1
        if exchange.receive_bytes:
            exchange.sequence = self._received[exchange.source]
            self._received[exchange.source] += 1

    def wait(self, exchange: Exchange) -> Tensor:
        source, sequence = exchange.source, exchange.sequence
        control, payload = self._incoming[source][sequence % SLOTS]
        self._await(control, sequence // SLOTS + 1 & _U32, source,
                    f"did not send message {sequence} to rank {self.rank}")
        message = self._bytes[payload:payload + exchange.receive_bytes]
        self._framing.verify(self._control, control + HEADER_OFFSET, source, sequence & _U32, message)
        return message

    def release(self, exchange: Exchange) -> None:
        control, _ = self._incoming[exchange.source][exchange.sequence % SLOTS]
        self._words[(control + FREED_OFFSET) // 4] = exchange.sequence // SLOTS + 1 & _U32
        futex_wake(self._address + control + FREED_OFFSET)

    def abort(self) -> None:
        if self._words[EPOCH_WORD] == self.epoch:  # never a ring that was formed after this one
            abort_waits(self._words, self._address, self.size, ABORTED_BY_RANK + self.rank)

    def close(self) -> None:
        """Let go of the mapping; it is unmapped when the last view of a message is gone."""
        self._words.release()
        self._control.release()
        self._bytes = self._filling = torch.empty(0, dtype=torch.uint8)

    def _places(self, source: int, destination: int) -> list[tuple[int, int]]:
        """Offsets of the control words and of the payload, for each slot of a pair."""
        if source == destination:
            return []
        pair = pair_index(source, destination, self.size)
        return [(control_offset(pair, slot), payload_offset(pair, slot, self.size, self._slot_bytes))
                for slot in range(SLOTS)]

    def _await(self, offset: int, value: int, peer: int, lack: str) -> None:
        """Wait until the word at `offset` is `value`; `lack` says what `peer` did not do when time is up."""
        words, index = self._words, offset // 4
        self._check_alive()
        for _ in range(self._spins):
            if words[index] == value:
                return
        deadline = time.monotonic() + self._timeout_s
        while (seen := words[index]) != value:
            self._check_alive()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise RingTimeoutError(f"rank {peer} {lack} within {self._timeout_s:g} s "
                                       f"(step {self._framing.step})", peer)
            futex_wait(self._address + offset, seen, min(remaining, WAIT_SLICE_S))

    def _check_alive(self) -> None:
        reason, epoch = self._words[ABORT_WORD], self._words[EPOCH_WORD]
        if reason:
            by = "the engine" if reason == ABORTED_BY_PARENT else f"rank {reason - ABORTED_BY_RANK}"
            raise RingAbortedError(f"rank {self.rank} left step {self._framing.step}: {by} aborted the ring")
        if epoch != self.epoch:
            raise RingAbortedError(f"rank {self.rank} left step {self._framing.step} of epoch {self.epoch}: "
                                   f"the ring is in epoch {epoch}")
