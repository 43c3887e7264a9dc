"""Rank processes that live for the whole test session, and rings of them over each transport."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringserve.ring.shared_memory import create_region, reset_region

REPOSITORY = Path(__file__).parents[3]
MAX_RANKS = 4
ANSWER_TIMEOUT_S = 30.0

Operation = list[Any]


class RankHandle:
    """The test's end of one rank process."""

    def __init__(self, region_fd: int) -> None:
        self.socket, theirs = socket.socketpair()
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ringserve.ring.rank_process", str(theirs.fileno())],
            cwd=REPOSITORY, env=environment, pass_fds=[theirs.fileno(), region_fd])
        theirs.close()
        self.socket.settimeout(ANSWER_TIMEOUT_S)
        self.lines = self.socket.makefile("rw")

    def ask(self, operations: list[Operation]) -> None:
        self.lines.write(json.dumps(operations) + "\n")
        self.lines.flush()

    def answer(self) -> list[Any]:
        line = self.lines.readline()
        assert line, f"rank process {self.process.pid} is gone"
        results: list[Any] = json.loads(line)
        return results

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ring:
    """A ring of the first rank processes, in an epoch of its own."""

    def __init__(self, ranks: list[RankHandle], region_fd: int) -> None:
        self.ranks = ranks
        self.size = len(ranks)
        self.region_fd = region_fd

    def ask(self, rank: int, *operations: Operation) -> None:
        self.ranks[rank].ask(list(operations))

    def answer(self, rank: int) -> list[Any]:
        return self.ranks[rank].answer()

    def run(self, rank: int, *operations: Operation) -> list[Any]:
        self.ask(rank, *operations)
        return self.answer(rank)

    def run_all(self, *operations: Operation) -> list[list[Any]]:
        """The same operations on every rank, at the same time."""
        for rank in range(self.size):
            self.ask(rank, *operations)
        return [self.answer(rank) for rank in range(self.size)]


class RingProcesses:
    """Starts rank processes when they are first needed and forms rings of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.region_fd = create_region(MAX_RANKS)
        self.epoch = 0
        self.ranks: list[RankHandle] = []

    def form(self, transport: str, size: int, *, slot_bytes: int = 4 << 20, **options: Any) -> Ring:
        """A new epoch of `size` ranks, in its step 0."""
        while len(self.ranks) < size:
            self.ranks.append(RankHandle(self.region_fd))
        ring = Ring(self.ranks[:size], self.region_fd)
        ring.run_all(["close"])
        self.epoch += 1
        options.setdefault("timeout_s", 10.0)
        for rank in range(size):
            if transport == "shm":
                if rank == 0:
                    reset_region(self.region_fd, size, slot_bytes, self.epoch)
                arguments = [self.region_fd, rank, size, self.epoch, {"slot_bytes": slot_bytes, **options}]
            else:
                arguments = [str(self.directory), rank, size, self.epoch, options]
            ring.ask(rank, [f"open_{transport}", *arguments], ["begin", 0])
        for rank in range(size):
            assert ring.answer(rank) == [None, None]
        return ring

    def replace(self, rank: int) -> None:
        """Bury a rank that was killed; the next ring that needs it starts another."""
        for handle in self.ranks[rank:]:
            handle.close()
        del self.ranks[rank:]

    def close(self) -> None:
        for handle in self.ranks:
            handle.close()
        os.close(self.region_fd)


@pytest.fixture(scope="session")
def ring_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RingProcesses]:
    processes = RingProcesses(tmp_path_factory.mktemp("ring"))
    yield processes
    processes.close()


@pytest.fixture(params=["shm", "gloo"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
