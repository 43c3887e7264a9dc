"""A ring of threads in one process: the kernels' loop under test without any transport."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TIMEOUT_S = 20.0


@dataclass
class _Ticket:
    source: int
    receive_bytes: int


class ThreadRing:
    """Implements `ringserve_kernels.Ring`; counts payload bytes per destination and checks lengths."""

    def __init__(self, rank: int, size: int, pipes: dict[tuple[int, int], queue.Queue[Tensor]]) -> None:
        self.rank, self.size, self._pipes = rank, size, pipes
        self.bytes_sent = [0] * size
        self.open = 0

    def post(self, shift: int, send_bytes: int, fill: Callable[[Tensor], None],
             receive_bytes: int) -> _Ticket:
        assert send_bytes or receive_bytes
        self.open += 1
        assert self.open <= 2, "more than two exchanges open"
        if send_bytes:
            buffer = torch.empty(send_bytes, dtype=torch.uint8)
            fill(buffer)
            to = (self.rank + shift) % self.size
            self.bytes_sent[to] += send_bytes
            self._pipes[self.rank, to].put(buffer, timeout=TIMEOUT_S)
        return _Ticket((self.rank - shift) % self.size, receive_bytes)

    def wait(self, ticket: _Ticket) -> Tensor:
        if not ticket.receive_bytes:
            return torch.empty(0, dtype=torch.uint8)
        message = self._pipes[ticket.source, self.rank].get(timeout=TIMEOUT_S)
        assert len(message) == ticket.receive_bytes, (len(message), ticket)
        return message

    def release(self, ticket: _Ticket) -> None:
        self.open -= 1


def run_ring(size: int, work: Callable[[ThreadRing], Tensor]) -> tuple[list[Tensor], list[ThreadRing]]:
    """Run `work` on every rank at once; returns its results and the rings with their counters."""
    pipes: dict[tuple[int, int], queue.Queue[Tensor]] = {
        (a, b): queue.Queue() for a in range(size) for b in range(size)}
    rings = [ThreadRing(rank, size, pipes) for rank in range(size)]
    results: list[Tensor | BaseException] = [torch.empty(0)] * size

    def body(rank: int) -> None:
        try:
            results[rank] = work(rings[rank])
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S * 2)
        assert not thread.is_alive(), "a rank hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert all(pipe.empty() for pipe in pipes.values()), "a message was sent that nobody expects"
    assert all(ring.open == 0 for ring in rings), "an exchange was never released"
    return [r for r in results if isinstance(r, Tensor)], rings
