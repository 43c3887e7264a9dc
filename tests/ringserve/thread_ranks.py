"""Ranks as threads of the test's process: the same runner and plans, where a test can break a part on purpose."""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ringserve.config import (
    AttentionName,
    CacheConfig,
    EngineConfig,
    KVCacheDtype,
    ModelConfig,
    RingConfig,
    RingMode,
    SchedulerConfig,
)
from ringserve.engine import LLMEngine
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.loading import load_checked
from ringserve.model.runner import ModelRunner
from ringserve.plan import ModelOutput, SchedulerOutput
from ringserve.rank_messages import CacheReady
from ringserve.ring.group import RingGroup
from ringserve.ring.transport import Exchange

TIMEOUT_S = 30.0
Pipes = dict[tuple[int, int], "queue.Queue[Tensor]"]


class QueueTransport:
    """A transport between threads: every message in a buffer of its own."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, epoch: int, pipes: Pipes) -> None:
        self.rank, self.size, self.epoch, self._pipes = rank, size, epoch, pipes

    def begin_step(self, step: int) -> None:
        pass

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        self._slot = torch.empty(n_bytes, dtype=torch.uint8)
        return self._slot

    def post(self, exchange: Exchange) -> None:
        if exchange.send_bytes:
            self._pipes[self.rank, exchange.destination].put(self._slot)

    def wait(self, exchange: Exchange) -> Tensor:
        message = self._pipes[exchange.source, self.rank].get(timeout=TIMEOUT_S)
        assert message.numel() == exchange.receive_bytes
        return message

    def release(self, exchange: Exchange) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class ThreadExecutor:
    """Implements `ringserve.executor.Executor`."""

    shares_host_memory = True

    def __init__(self, runners: Sequence[ModelRunner]) -> None:
        self._runners = runners
        self.ring_size = len(runners)
        self.epoch = 0
        self.groups = runners[0].groups
        self.kv_bytes_per_token = 1
        self.linear_flops_per_token = 1.0
        self._threads = ThreadPoolExecutor(self.ring_size)

    def allocate(self, slots: int) -> list[CacheReady]:
        self.epoch += 1
        pipes: Pipes = {(a, b): queue.Queue() for a in range(self.ring_size) for b in range(self.ring_size)}
        for rank, runner in enumerate(self._runners):
            runner.allocate(slots, RingGroup(QueueTransport(rank, self.ring_size, self.epoch, pipes)))
        return [CacheReady(rank=rank, attention_flops=1e9, link_bytes_per_s=1e9)
                for rank in range(self.ring_size)]

    def free_bytes(self) -> list[int]:
        return [1 << 40] * self.ring_size

    def execute(self, plan: SchedulerOutput) -> ModelOutput:
        reports = list(self._threads.map(lambda runner: runner.execute(plan), self._runners))
        return ModelOutput(plan.step, [s for report in reports for s in report.sampled], reports)

    def close(self) -> None:
        self._threads.shutdown()


def thread_engine(checkpoint: Path, ring_size: int, mode: RingMode, block_size: int = 16,
                  chunk: int = 96, attention: AttentionName = "auto",
                  kv_cache_dtype: KVCacheDtype = "auto") -> LLMEngine:
    """An engine over `ring_size` threads that share one model."""
    config = EngineConfig(
        model=ModelConfig(model=str(checkpoint)), cache=CacheConfig(block_size=block_size, kv_cache_gib=1e-5),
        ring=RingConfig(ring_size=ring_size, device="cpu", ring_mode=mode, ring_segment=64),
        scheduler=SchedulerConfig(max_chunk_tokens=chunk, max_running_requests=16, max_step_ms=1e6))
    read = read_checkpoint(config.model)
    dtype = getattr(torch, read.dtype)
    model, layers = load_checked(read, torch.device("cpu"), dtype)
    runners = [ModelRunner(model, layers, block_size=block_size, segment=64, device=torch.device("cpu"), dtype=dtype,
                           attention=attention, kv_cache_dtype=kv_cache_dtype)
               for _ in range(ring_size)]
    return LLMEngine(config, ThreadExecutor(runners), read.max_model_len, read.vocab_size, dtype.itemsize)
