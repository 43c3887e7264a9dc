"""Ranks on CUDA devices through NCCL: one batched send and receive per exchange, in the order of the stream.

Written without GPUs at hand: read it beside NCCL's manual before trusting it, and run the transport tests on
two devices first.

What differs from the transports of the host:
- `wait` makes the current stream wait, not the host: the host runs ahead, and the seconds it reports are not
  the transfer's. All calls must be made under the same current stream.
- A peer that never sends is noticed by NCCL's watchdog after the time-out; it ends the process, and the
  engine sees a rank that died. `abort` frees this rank's own pending operations.
- NCCL's bootstrap listens on the interfaces named by NCCL_SOCKET_IFNAME: on one host the parent starts the
  ranks with NCCL_SOCKET_IFNAME=lo.
- Two ranks may not share a device, and a process has one NCCL transport at a time: the old epoch's is closed
  before the new one is made.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ringserve.ring.device import DeviceTransport
from ringserve.ring.staging import SLOTS, StagingBuffers
from ringserve.ring.transport import HEADER_BYTES, Exchange


class NcclTransport(DeviceTransport):
    """One rank's end of an NCCL communicator, which is the process' default process group for the epoch."""

    def __init__(self, directory: str, *, rank: int, size: int, epoch: int, device: torch.device,
                 timeout_s: float, checksums: bool = False) -> None:
        """`directory`: made for this start, private to the user, shared by the ranks; one file per epoch."""
        super().__init__(rank=rank, size=size, epoch=epoch, device=device, checksums=checksums)
        self._outgoing = StagingBuffers(device)
        self._incoming = StagingBuffers(device)
        self._sent = [0] * size
        self._received = [0] * size
        self._sending: dict[tuple[int, int], list[dist.Work]] = {}
        self._receiving: dict[tuple[int, int], tuple[list[dist.Work], Tensor]] = {}
        torch.cuda.set_device(device)  # batched point-to-point hangs on another current device
        store = FileStore(os.path.join(directory, f"nccl-epoch-{epoch}"), size)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device,
                                timeout=timedelta(seconds=timeout_s))
        dist.barrier()  # the first operation of a communicator must be made by all of its ranks

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        sequence = self._sent[destination]
        for work in self._sending.pop((destination, sequence % SLOTS), ()):
            work.wait()  # the stream that fills the buffer waits until the message before has left it
        return self._outgoing.take(destination, sequence, n_bytes)[HEADER_BYTES:]

    def post(self, exchange: Exchange) -> None:
        source, destination = exchange.source, exchange.destination
        sent, received = self._sent[destination], self._received[source]
        operations = []
        buffer = None
        if exchange.send_bytes:
            packed = self._outgoing.take(destination, sent, exchange.send_bytes)
            self._seal(packed, sent)
            operations.append(dist.P2POp(dist.isend, packed, destination))
        if exchange.receive_bytes:
            buffer = self._incoming.take(source, received, exchange.receive_bytes)
            operations.append(dist.P2POp(dist.irecv, buffer, source))
        works = dist.batch_isend_irecv(operations)
        if exchange.send_bytes:
            self._sending[destination, sent % SLOTS] = works
            self._sent[destination] = sent + 1
        if buffer is not None:
            self._receiving[source, received] = works, buffer
            self._received[source] = received + 1
            exchange.sequence = received

    def wait(self, exchange: Exchange) -> Tensor:
        source, sequence = exchange.source, exchange.sequence
        works, buffer = self._receiving.pop((source, sequence))
        for work in works:
            work.wait()
        return self._opened(buffer, source, sequence)

    def release(self, exchange: Exchange) -> None:
        """Nothing to do: a later receive into this buffer is ordered after the reads on the stream."""

    def abort(self) -> None:
        dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        self._sending.clear()
        self._receiving.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
