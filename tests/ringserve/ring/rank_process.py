"""A rank process for the ring tests: runs lists of operations that come as JSON lines, answers with results.

One process serves many cases, because importing torch takes seconds. An operation that raises ends its list;
the answer then ends with the error's type, text and how long the operation took.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from ringserve_kernels.ring import Ticket
from torch import Tensor

from ringserve.ring.gloo import GlooTransport
from ringserve.ring.group import RingGroup
from ringserve.ring.shared_memory import SharedMemoryTransport


def pattern(n_bytes: int, *seed: int) -> Tensor:
    """Bytes that name the exchange and its sender."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8))


def fill_with(seed: int, k: int, sender: int, buffer: Tensor) -> None:
    """Write the pattern of exchange k."""
    buffer.copy_(pattern(buffer.numel(), seed, k, sender))


def differences(message: Tensor, n_bytes: int, *seed: int) -> int:
    """Bytes of a message that are not the pattern's; a missing tail counts."""
    due = pattern(n_bytes, *seed)
    if message.numel() != n_bytes:
        return max(message.numel(), n_bytes)
    return int((message != due).sum())


class RankProcess:
    """The operations a test may ask for, one method each."""

    def __init__(self) -> None:
        self.group = RingGroup(None)
        self.epoch = 0
        self.tickets: dict[str, Ticket] = {}

    def run(self, operations: list[list[Any]]) -> list[Any]:
        results: list[Any] = []
        for name, *arguments in operations:
            started = time.monotonic()
            try:
                results.append(getattr(self, f"do_{name}")(*arguments))
            except Exception as error:
                results.append({"error": type(error).__name__, "message": str(error),
                                "seconds": time.monotonic() - started, "waiting_for": self.group.waiting_for})
                break
        return results

    def do_open_shm(self, fd: int, rank: int, size: int, epoch: int, options: dict[str, Any]) -> None:
        self._enter(RingGroup(SharedMemoryTransport(fd, rank=rank, size=size, epoch=epoch, **options)), epoch)

    def do_open_gloo(self, directory: str, rank: int, size: int, epoch: int, options: dict[str, Any]) -> None:
        self._enter(RingGroup(GlooTransport(directory, rank=rank, size=size, epoch=epoch, **options)), epoch)

    def do_close(self) -> None:
        self._enter(RingGroup(None), 0)

    def do_begin(self, step: int) -> None:
        self.group.begin_step(step, self.epoch)

    def do_post(self, key: str, shift: int, send_bytes: int, receive_bytes: int, seed: int = 0) -> None:
        def fill(buffer: Tensor) -> None:
            assert buffer.shape == (send_bytes,) and buffer.dtype == torch.uint8
            assert buffer.data_ptr() % 64 == 0
            buffer.copy_(pattern(send_bytes, seed))

        self.tickets[key] = self.group.post(shift, send_bytes, fill, receive_bytes)

    def do_wait(self, key: str, receive_bytes: int, seed: int = 0) -> int:
        message = self.group.wait(self.tickets[key])
        assert message.numel() == 0 or message.data_ptr() % 64 == 0
        return differences(message, receive_bytes, seed)

    def do_release(self, key: str) -> None:
        self.group.release(self.tickets.pop(key))

    def do_exchanges(self, seed: int, shifts: list[int], sizes: list[list[int]], ahead: int,
                     pauses: list[float]) -> int:
        """All exchanges of a plan, `ahead` of them posted early: sizes[k][r] bytes go out of rank r.

        Returns how many bytes came in wrong. `pauses[k % ...]` seconds pass before exchange k is released.
        """
        rank, size = self.group.rank, self.group.size
        tickets: list[Ticket] = []
        wrong = 0
        for k in range(len(shifts) + ahead):
            if k < len(shifts):
                incoming = sizes[k][(rank - shifts[k]) % size]
                fill = partial(fill_with, seed, k, rank)
                tickets.append(self.group.post(shifts[k], sizes[k][rank], fill, incoming))
            if (j := k - ahead) >= 0:
                source = (rank - shifts[j]) % size
                message = self.group.wait(tickets[j])
                time.sleep(pauses[j % len(pauses)])
                wrong += differences(message, sizes[j][source], seed, j, source)
                self.group.release(tickets[j])
        return wrong

    def do_round_trips(self, n: int, n_bytes: int) -> float:
        """Seconds for `n` messages of rank 0 to rank 1, each answered by one as long."""
        first = self.group.rank == 0
        started = time.perf_counter()
        for _ in range(n):
            for mine in (first, not first):
                send_bytes, receive_bytes = (n_bytes, 0) if mine else (0, n_bytes)
                ticket = self.group.post(1, send_bytes, lambda buffer: None, receive_bytes)
                self.group.wait(ticket)
                self.group.release(ticket)
        return time.perf_counter() - started

    def do_statistics(self) -> dict[str, Any]:
        statistics = self.group.statistics()
        self.group.reset_statistics()
        return {name: getattr(statistics, name) for name in statistics.__slots__}

    def do_listeners(self) -> list[str]:
        connections = psutil.Process().net_connections("inet")
        return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]

    def do_abort(self) -> None:
        self.group.abort()

    def do_kill_self_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    def do_threads(self, n: int) -> None:
        torch.set_num_threads(n)

    def _enter(self, group: RingGroup, epoch: int) -> None:
        self.tickets.clear()
        self.group.close()
        self.group, self.epoch = group, epoch


def main(fd: int) -> None:
    torch.set_num_threads(1)
    process = RankProcess()
    with socket.socket(fileno=fd) as control, control.makefile("rw") as lines:
        for line in lines:
            lines.write(json.dumps(process.run(json.loads(line))) + "\n")
            lines.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
