"""Rings of real rank processes, kept alive over many tests: importing torch takes seconds in each process.

Their steps have no time limit, so that chunks are the same on every machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ringserve.config import CacheConfig, EngineConfig, ModelConfig, RingConfig, RingMode, SchedulerConfig
from ringserve.devices import place_ranks
from ringserve.engine import LLMEngine
from ringserve.executor import LocalExecutor
from ringserve.model.checkpoint import read_checkpoint

BLOCK = 16
CHUNK = 96


class Rings:
    """Executors by (ring size, transport), started when first asked for."""

    def __init__(self) -> None:
        self._executors: dict[tuple[int, str], LocalExecutor] = {}
        self._loaded: dict[tuple[int, str], Path] = {}

    def engine(self, checkpoint: Path, ring_size: int, *, mode: RingMode = "auto", transport: str = "shm",
               block_size: int = BLOCK, chunk: int = CHUNK, segment: int = 64, kv_cache_gib: float = 0.01) -> LLMEngine:
        """A fresh engine (empty cache, no requests) for this model on the ring."""
        ring = RingConfig(ring_size=ring_size, device="cpu", threads_per_rank=1, ring_mode=mode,
                          ring_segment=segment, ring_timeout_s=30, step_timeout_s=60,
                          transport="auto" if ring_size == 1 else transport)  # type: ignore[arg-type]
        config = EngineConfig(
            model=ModelConfig(model=str(checkpoint)), ring=ring,
            cache=CacheConfig(block_size=block_size, kv_cache_gib=kv_cache_gib),
            scheduler=SchedulerConfig(max_chunk_tokens=chunk, max_running_requests=16, max_step_ms=1e6))
        key = (ring_size, transport)
        if key not in self._executors:
            self._executors[key] = LocalExecutor(ring_size, place_ranks(ring), 60)
        read = read_checkpoint(config.model)
        executor = self._executors[key]
        executor.load(config, str(checkpoint), read.dtype)
        return LLMEngine(config, executor, read.max_model_len, read.vocab_size, read.element_bytes)

    def remode(self, engine: LLMEngine, mode: RingMode) -> LLMEngine:
        """The same model and ranks with another mode and an empty cache."""
        config = replace(engine.config, ring=replace(engine.config.ring, ring_mode=mode))
        return LLMEngine(config, engine.executor, engine.max_model_len, engine._vocab_size, engine._element_bytes)

    def close(self) -> None:
        for executor in self._executors.values():
            executor.close()


@contextmanager
def open_rings() -> Iterator[Rings]:
    rings = Rings()
    try:
        yield rings
    finally:
        rings.close()
