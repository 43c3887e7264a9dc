"""Executor: runs a plan on all ranks. LocalExecutor starts them as processes of this host."""

import selectors
import shutil
import tempfile
import time
from collections.abc import Collection
from typing import Protocol, TypeVar

from ringserve.channel import ChannelClosedError
from ringserve.config import EngineConfig
from ringserve.devices import Placement
from ringserve.errors import EngineDeadError, RingTimeoutError, StartupError, error_named
from ringserve.plan import LayerGroup, ModelOutput, RankOutput, SchedulerOutput
from ringserve.processes import ChildProcess
from ringserve.rank_messages import (
    AllocateCache,
    CacheReady,
    FreeMemory,
    FromRank,
    MeasureMemory,
    MissedPlans,
    RankFailed,
    RankLoaded,
    RankSetup,
)

T = TypeVar("T", RankLoaded, CacheReady, FreeMemory, RankOutput)

LOAD_TIMEOUT_S = 1800.0
"""For reading the weights of a large model from a slow disk."""
STALL_S = 60.0
"""A rank that takes or sends nothing in the middle of a message for so long is given up."""
MOST_MISSED = 64
"""Plans that are kept for a rank before it hears of them."""
CULPRIT_S = 1.0
"""When a rank reports that the ring broke, the one that broke it is heard of within this time."""
_CONSEQUENCES = ("RingAbortedError", "RingTimeoutError", "RingProtocolError")


class Executor(Protocol):
    """What the engine needs of the ranks, wherever they run."""

    ring_size: int
    epoch: int
    """Of the ring as it is formed now."""
    shares_host_memory: bool
    """The ranks' caches come out of one memory."""
    groups: list[LayerGroup]
    kv_bytes_per_token: int
    linear_flops_per_token: float

    def allocate(self, slots: int) -> list[CacheReady]:
        """A fresh cache of `slots` on every rank. All earlier blocks are gone."""
        ...

    def free_bytes(self) -> list[int]:
        """Memory that is free now on each rank's device."""
        ...

    def execute(self, plan: SchedulerOutput) -> ModelOutput:
        """Run one step; returns when every rank that has a part in it has reported. Raises EngineDeadError naming the
        rank."""
        ...

    def close(self) -> None: ...


class LocalExecutor:
    """One process per rank on this host."""

    def __init__(self, ring_size: int, placement: Placement, step_timeout_s: float) -> None:
        self.ring_size, self._placement, self._timeout_s = ring_size, placement, step_timeout_s
        self.epoch = 0
        self.shares_host_memory = placement.devices[0] == "cpu"
        meet_in_files = placement.transport in ("gloo", "nccl", "symm")
        self._directory = tempfile.mkdtemp(prefix="ringserve-") if meet_in_files else ""
        self._region = -1
        if ring_size > 1 and placement.transport == "shm":
            from ringserve.ring.region import create_region

            self._region = create_region(ring_size)
        self._ranks: list[ChildProcess] = []
        self._holders: dict[int, set[int]] = {}
        """By handle: the ranks that hold the request's blocks."""
        self._missed: list[list[SchedulerOutput]] = []
        """[ranks] plans that a rank has not heard of."""
        self._selector = selectors.DefaultSelector()
        try:
            for rank in range(ring_size):
                self._ranks.append(ChildProcess(
                    "ringserve.rank_process", FromRank, pass_fds=(self._region,) if self._region >= 0 else (),
                    environment=placement.environment(rank)))
                self._ranks[rank].channel.limit_stalls(STALL_S)
                self._selector.register(self._ranks[rank].socket, selectors.EVENT_READ, rank)
        except BaseException:
            self.close()
            raise

    def load(self, config: EngineConfig, checkpoint: str, dtype: str) -> None:
        """Load a model on every rank, in place of any there is. Raises StartupError or EngineDeadError."""
        for rank, process in enumerate(self._ranks):
            self._send(rank, process, RankSetup(
                rank=rank, config=config, checkpoint=checkpoint, dtype=dtype, device=self._placement.devices[rank],
                threads=self._placement.threads, transport=self._placement.transport, region_fd=self._region,
                directory=self._directory))
        loaded = self._collect(RankLoaded, LOAD_TIMEOUT_S)
        first = loaded[0]
        assert all(other.groups == first.groups for other in loaded), "ranks loaded different models"
        self.groups = first.groups
        self.kv_bytes_per_token = first.kv_bytes_per_token
        self.linear_flops_per_token = first.linear_flops_per_token
        self._agreed, self.kernels, self.attention = agreement(loaded)
        self.linear = first.linear
        self._message_bytes = first.message_bytes

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._ranks]

    def allocate(self, slots: int) -> list[CacheReady]:
        self.epoch += 1
        self._holders = {}
        self._missed = [[] for _ in self._ranks]
        if self._region >= 0:
            from ringserve.ring.region import reset_region

            reset_region(self._region, self.ring_size, self._message_bytes, self.epoch)
        for rank, process in enumerate(self._ranks):
            self._send(rank, process, AllocateCache(
                slots=slots, epoch=self.epoch, message_bytes=self._message_bytes, agreed=self._agreed))
        return self._collect(CacheReady, self._timeout_s)

    def free_bytes(self) -> list[int]:
        for rank, process in enumerate(self._ranks):
            self._send(rank, process, MeasureMemory())
        return [report.free_bytes for report in self._collect(FreeMemory, self._timeout_s)]

    def execute(self, plan: SchedulerOutput) -> ModelOutput:
        involved = self._involved(plan)
        for rank, process in enumerate(self._ranks):
            missed = self._missed[rank]
            if rank not in involved:
                missed.append(plan)
            if missed and (rank in involved or len(missed) >= MOST_MISSED):
                self._send(rank, process, MissedPlans(plans=missed))
                self._missed[rank] = []
            if rank in involved:
                self._send(rank, process, plan)
        reports = self._collect(RankOutput, self._timeout_s, involved)
        assert all(report.step == plan.step for report in reports), (plan.step, [r.step for r in reports])
        return ModelOutput(plan.step, [sampled for report in reports for sampled in report.sampled], reports)

    def _involved(self, plan: SchedulerOutput) -> set[int]:
        """Ranks with something to do: a row, or a key that a row may see, or a copy. The others hear of the plan when
        they have something to do again, so that a short request on a wide ring costs no more than on one rank."""
        for handle in plan.released:
            self._holders.pop(handle, None)
        for dealt in plan.blocks:
            self._holders.setdefault(dealt.handle, set()).update(dealt.holders)
        ranks = {rank for rows in plan.rows for rank in self._holders[rows.handle]}
        return ranks | {rank for copy in plan.copies for rank in (copy.source, copy.destination)}

    def close(self) -> None:
        """End all ranks and wait until they are gone. The region is left to the process' end: a rank that
        computes may still write to it."""
        self._abort()
        for process in self._ranks:
            process.channel.close()
        for process in self._ranks:
            process.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, rank: int, process: ChildProcess, message: object) -> None:
        try:
            process.channel.send(message)
        except ChannelClosedError:
            raise self._died(rank) from None

    def _collect(self, kind: type[T], timeout_s: float, ranks: Collection[int] | None = None) -> list[T]:
        """One message of each of these ranks (all by default), in rank order."""
        reports: dict[int, T] = {}
        ranks = range(self.ring_size) if ranks is None else ranks
        deadline = time.monotonic() + timeout_s
        while len(reports) < len(ranks):
            for rank, message in self._receive(deadline):
                if isinstance(message, RankFailed):
                    raise self._failure(message)
                assert isinstance(message, kind), f"rank {rank} sent {type(message).__name__}, not {kind.__name__}"
                reports[rank] = message
        return [reports[rank] for rank in sorted(ranks)]

    def _receive(self, deadline: float) -> list[tuple[int, FromRank]]:
        ready = self._selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            self._abort()
            raise RingTimeoutError("the ranks did not report in time")
        messages: list[tuple[int, FromRank]] = []
        for key, _ in ready:
            try:
                messages.append((key.data, self._ranks[key.data].channel.receive()))
            except ChannelClosedError:
                raise self._died(key.data) from None
        return messages

    def _abort(self) -> None:
        """Free ranks that wait for a peer which will not come."""
        if self._region >= 0:
            from ringserve.ring.region import abort_region

            abort_region(self._region)

    def _died(self, rank: int) -> EngineDeadError:
        self._abort()
        code = self._ranks[rank].exit_code(CULPRIT_S)
        how = "stopped answering" if code is None else (
            f"was ended by signal {-code}" if code < 0 else f"exited with code {code}")
        return EngineDeadError(f"rank {rank} (pid {self._ranks[rank].pid}) {how}", rank)

    def _failure(self, failed: RankFailed) -> Exception:
        """The error behind a rank's last message: the operator's, or the rank that failed first."""
        self._abort()
        if (kind := error_named(failed.kind, StartupError)) is not None:
            return kind(failed.message)
        if failed.kind in _CONSEQUENCES:
            deadline = time.monotonic() + CULPRIT_S
            try:
                while time.monotonic() < deadline:
                    for _, message in self._receive(deadline):
                        if isinstance(message, RankFailed) and message.kind not in _CONSEQUENCES:
                            return self._failure(message)
            except (EngineDeadError, RingTimeoutError) as error:
                if isinstance(error, EngineDeadError) and error.rank != failed.rank:
                    return error
        if failed.peer is not None:
            return EngineDeadError(f"rank {failed.peer} hangs: {failed.message}", failed.peer)
        return EngineDeadError(f"rank {failed.rank} failed: {failed.message}", failed.rank)


def agreement(ranks: list[RankLoaded]) -> tuple[list[bool], list[str], list[str]]:
    """By group of layers: whether keys would lie alike on all ranks, what computes it then, and that in words. Keys
    travel as they lie, so where they would not lie alike torch's operations serve on all ranks."""
    agreed, kernels, words = [], [], []
    for group, said in enumerate(ranks[0].attention):
        agreed.append(len({rank.orders[group] for rank in ranks}) == 1)
        kernels.append(", ".join(sorted({rank.kernels[group] for rank in ranks})) if agreed[-1] else "torch")
        words.append(said if agreed[-1] else f"{said}; torch on all ranks, because their keys would lie differently")
    return agreed, kernels, words
