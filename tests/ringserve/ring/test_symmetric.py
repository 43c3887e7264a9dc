"""Symmetric memory's order of signals, copies and waits, with threads in the places of devices and streams: ranks are
threads, the copy stream of each is another, signals block, and copies take a while. What only devices can show, the
calls of CUDA themselves, is not tested here."""

import queue
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ringserve.ring import symmetric
from ringserve.ring.group import RingGroup
from ringserve.ring.symmetric import SymmetricMemoryTransport
from ringserve.ring.transport import HEADER_BYTES, RingProtocolError
from tests.ringserve.ring.rank_process import differences, fill_with
from tests.ringserve.ring.test_exchanges import random_plan

TIMEOUT_S = 20.0
SLOT_BYTES = 4 << 20
CPU = torch.device("cpu")


class Pads:
    """Signal pads of all ranks: a signal is put where none stands, and taken by who waits for it."""

    def __init__(self) -> None:
        self._set: set[tuple[int, int, int]] = set()
        self._changed = threading.Condition()

    def put(self, source: int, destination: int, channel: int, timeout_ms: int) -> None:
        self._when((destination, channel, source), False, timeout_ms)

    def take(self, source: int, destination: int, channel: int, timeout_ms: int) -> None:
        self._when((destination, channel, source), True, timeout_ms)

    def _when(self, pad: tuple[int, int, int], there: bool, timeout_ms: int) -> None:
        """Once the signal is there, or is not, it is the other way round."""
        with self._changed:
            if not self._changed.wait_for(lambda: (pad in self._set) == there, timeout_ms / 1000):
                raise TimeoutError(f"signal {pad} stays {'away' if there else 'there'}")
            (self._set.remove if there else self._set.add)(pad)
            self._changed.notify_all()


class Host:
    """The memory of all ranks."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}
        self.pads: dict[int, Pads] = defaultdict(Pads)

    def open(self, directory: str, *, rank: int, size: int, epoch: int, device: torch.device, n_bytes: int,
             timeout_s: float) -> "Handle":
        self.buffers[rank] = torch.full((n_bytes,), 0xEE, dtype=torch.uint8)
        return Handle(self, rank, epoch)


class Handle:
    def __init__(self, host: Host, rank: int, epoch: int) -> None:
        self._host, self._rank, self._pads = host, rank, host.pads[epoch]

    def get_buffer(self, rank: int, sizes: tuple[int], dtype: torch.dtype, offset: int) -> Tensor:
        assert dtype is torch.uint8
        return self._host.buffers[rank][offset:offset + sizes[0]]

    def put_signal(self, destination: int, channel: int, timeout_ms: int) -> None:
        self._pads.put(self._rank, destination, channel, timeout_ms)

    def wait_signal(self, source: int, channel: int, timeout_ms: int) -> None:
        self._pads.take(source, self._rank, channel, timeout_ms)


class ThreadStream:
    """`CopyStream` as a thread that does one thing after the other, late."""

    def __init__(self, device: torch.device) -> None:
        self._work: queue.Queue[Callable[[], None]] = queue.Queue()
        self.error: BaseException | None = None
        threading.Thread(target=self._go, daemon=True).start()

    def run(self, work: Callable[[], None], after: threading.Event | None) -> threading.Event:
        done = threading.Event()

        def late() -> None:
            if after is not None:
                self.await_mark(after)
            time.sleep(random.random() * 2e-4)  # a copy takes a while: who does not wait for it sees old bytes
            work()
            done.set()

        self._work.put(late)
        return done

    def mark(self) -> threading.Event:
        event = threading.Event()
        event.set()  # the compute stream is the rank's own thread: what was enqueued there is done
        return event

    def await_mark(self, mark: threading.Event) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not mark.wait(0.01):
            if self.error is not None:
                raise self.error
            assert time.monotonic() < deadline, "the copy stream hangs"

    def _go(self) -> None:
        try:
            while True:
                self._work.get()()
        except BaseException as error:
            self.error = error


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(symmetric, "open_symmetric", made.open)
    monkeypatch.setattr(symmetric, "CopyStream", ThreadStream)
    return made


def make_transport(rank: int, size: int, epoch: int = 0, timeout_s: float = TIMEOUT_S,
                   checksums: bool = False) -> SymmetricMemoryTransport:
    return SymmetricMemoryTransport("", rank=rank, size=size, slot_bytes=SLOT_BYTES, epoch=epoch, device=CPU,
                                    timeout_s=timeout_s, checksums=checksums)


def run_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as threads:
        return [future.result(TIMEOUT_S * 2) for future in [threads.submit(work, rank) for rank in range(size)]]


def exchange(group: RingGroup, shifts: list[int], sizes: list[list[int]], seed: int, ahead: int,
             pause: Callable[[], float]) -> int:
    """Every exchange of a plan, `ahead` of them in flight; the bytes that came in wrong."""
    wrong, tickets = 0, []
    for k in range(len(shifts) + ahead):
        if k < len(shifts):
            incoming = sizes[k][(group.rank - shifts[k]) % group.size]
            fill = partial(fill_with, seed, k, group.rank)
            tickets.append(group.post(shifts[k], sizes[k][group.rank], fill, incoming))
        if (j := k - ahead) >= 0:
            source = (group.rank - shifts[j]) % group.size
            message = group.wait(tickets[j])
            time.sleep(pause())  # a slow reader, whom a sender must not overtake
            wrong += differences(message, sizes[j][source], seed, j, source)
            group.release(tickets[j])
    return wrong


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("checksums", [False, True])
def test_random_exchanges_arrive_byte_for_byte(host: Host, size: int, checksums: bool) -> None:
    groups = run_ranks(size, lambda rank: RingGroup(make_transport(rank, size, checksums=checksums)))
    for step in range(3):
        shifts, sizes = random_plan(size, seed=100 * size + step)

        def rank_step(rank: int, step: int = step, shifts: list[int] = shifts, sizes: list[list[int]] = sizes) -> int:
            chance = random.Random(rank)
            groups[rank].begin_step(step, epoch=0)
            return exchange(groups[rank], shifts, sizes, step, step % 2, lambda: chance.random() * 1e-3)

        assert run_ranks(size, rank_step) == [0] * size


def test_a_slow_reader_never_sees_its_inbox_overwritten(host: Host) -> None:
    groups = run_ranks(2, lambda rank: RingGroup(make_transport(rank, 2)))

    def rank_step(rank: int) -> int:
        groups[rank].begin_step(0, epoch=0)
        return exchange(groups[rank], [1] * 12, [[50_000 + k, 0] for k in range(12)], 7, 1,
                        lambda: 0.01 if rank == 1 else 0.0)

    assert run_ranks(2, rank_step) == [0, 0]


class Mark(threading.Event):
    """Not reached until it is set; knows that somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.awaited.set()
        return super().wait(timeout)


def test_an_inbox_is_not_written_while_it_may_be_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has gone on; the device reaches the mark behind its last read later."""
    sender, receiver = run_ranks(2, lambda rank: RingGroup(make_transport(rank, 2)))
    reached = Mark()
    monkeypatch.setattr(ThreadStream, "mark", lambda stream: reached)
    for group in (sender, receiver):
        group.begin_step(0, epoch=0)
    messages = []
    for number in range(2):
        sender.release(sender.post(1, 100, partial(Tensor.fill_, value=number), 0))
        ticket = receiver.post(1, 0, lambda _: None, 100)
        messages.append(receiver.wait(ticket))
        receiver.release(ticket)
    sender.release(sender.post(1, 100, lambda buffer: buffer.fill_(2), 0))
    ticket = receiver.post(1, 0, lambda _: None, 100)
    assert reached.awaited.wait(TIMEOUT_S)
    assert (messages[0] == 0).all()
    reached.set()
    assert (receiver.wait(ticket) == 2).all()


def test_epochs_share_nothing(host: Host) -> None:
    for epoch in range(3):
        groups = run_ranks(2, lambda rank, epoch=epoch: RingGroup(make_transport(rank, 2, epoch)))

        def rank_step(rank: int, groups: list[RingGroup] = groups, epoch: int = epoch) -> int:
            groups[rank].begin_step(0, epoch)
            wrong = exchange(groups[rank], [1] * 3, [[10, 20], [30, 40], [50, 60]], epoch, 0, lambda: 0.0)
            groups[rank].close()
            return wrong

        assert run_ranks(2, rank_step) == [0, 0]


def test_a_peer_that_never_sends_is_given_up(host: Host) -> None:
    groups = run_ranks(2, lambda rank: RingGroup(make_transport(rank, 2, timeout_s=0.2)))
    groups[0].begin_step(0, epoch=0)
    ticket = groups[0].post(1, 0, lambda _: None, 100)
    with pytest.raises(TimeoutError, match="stays away"):
        groups[0].wait(ticket)


def test_a_peer_that_never_reads_is_given_up(host: Host) -> None:
    groups = run_ranks(2, lambda rank: RingGroup(make_transport(rank, 2, timeout_s=0.2)))
    groups[0].begin_step(0, epoch=0)
    with pytest.raises(TimeoutError, match="stays away"):
        for _ in range(3):
            groups[0].release(_posted(groups[0]))


def _posted(group: RingGroup) -> Any:
    ticket = group.post(1, 100, lambda buffer: buffer.zero_(), 0)
    group.wait(ticket)
    return ticket


def test_damaged_bytes_are_seen_with_checksums(host: Host) -> None:
    groups = run_ranks(2, lambda rank: RingGroup(make_transport(rank, 2, checksums=True)))
    for group in groups:
        group.begin_step(0, epoch=0)
    _posted(groups[0])
    where = int((host.buffers[0] != 0xEE).nonzero()[0]) + HEADER_BYTES + 5
    host.buffers[0][where] = 1
    with pytest.raises(RingProtocolError, match="damaged bytes"):
        groups[1].wait(groups[1].post(1, 0, lambda _: None, 100))


def test_messages_that_do_not_fit_are_refused(host: Host) -> None:
    group = RingGroup(make_transport(0, 2))
    group.begin_step(0, epoch=0)
    with pytest.raises(AssertionError, match="does not fit a slot"):
        group.post(1, SLOT_BYTES + 1, lambda _: None, 0)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    random.seed(0)
    yield
