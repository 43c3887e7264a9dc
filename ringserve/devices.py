"""Placement: which device, how many threads and which transport each rank gets, and why."""

import itertools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from ringserve.config import RingConfig
from ringserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Placement:
    devices: list[str]
    threads: int
    transport: str
    reasons: list[str]

    def environment(self, rank: int) -> dict[str, str]:
        """For the rank's process: OpenMP threads are counted before torch can be told."""
        return {"OMP_NUM_THREADS": str(self.threads), "NCCL_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}


def place_ranks(config: RingConfig) -> Placement:
    """Decide from what the machine has. Raises ConfigError when a wish cannot be met."""
    reasons: list[str] = []
    gpus = _cuda_devices() if config.device != "cpu" else 0
    if config.device == "cuda" and gpus < config.ring_size:
        raise ConfigError(f"device cuda with ring_size {config.ring_size} needs that many CUDA devices, "
                          f"this machine has {gpus}")
    on_gpu = gpus >= config.ring_size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.threads_per_rank or max(1, cores // config.ring_size)
    if on_gpu:
        devices = [f"cuda:{rank}" for rank in range(config.ring_size)]
        reasons.append(f"devices: {', '.join(devices)} ({gpus} found)")
    else:
        devices = ["cpu"] * config.ring_size
        why = "asked for" if config.device == "cpu" else f"{gpus} CUDA devices for {config.ring_size} ranks"
        reasons.append(f"devices: cpu, {config.ring_size} x {threads} threads on {cores} cores ({why})")
    transport = _transport(config, on_gpu, reasons)
    return Placement(devices=devices, threads=threads, transport=transport, reasons=reasons)


def _transport(config: RingConfig, on_gpu: bool, reasons: list[str]) -> str:
    shm_works = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    best = "nccl" if on_gpu else "shm" if shm_works else "gloo"
    chosen = best if config.transport == "auto" else config.transport
    if (chosen in ("nccl", "symm")) != on_gpu:
        raise ConfigError(f"transport {chosen} does not fit ranks on {'CUDA devices' if on_gpu else 'the CPU'}")
    if chosen == "symm" and (apart := _pair_apart(config.ring_size)):
        raise ConfigError(f"transport symm needs devices that reach each other's memory; {apart} do not: use nccl")
    if chosen == "shm" and not shm_works:
        raise ConfigError("transport shm needs Linux on x86_64: use gloo")
    if config.ring_size == 1:
        reasons.append("ring: 1 rank, nothing travels")
        return "none"
    why = "asked for" if config.transport != "auto" else {
        "shm": "all ranks on one host", "nccl": "ranks on GPUs", "gloo": "no shared memory transport here"}[chosen]
    reasons.append(f"ring: {config.ring_size} ranks over {chosen} ({why}), mode {config.ring_mode}, segments of "
                   f"{config.ring_segment} tokens")
    return chosen


def _pair_apart(ring_size: int) -> str | None:
    """Two of the ranks' devices that cannot read each other's memory."""
    import torch

    return next((f"cuda:{a} and cuda:{b}" for a, b in itertools.permutations(range(ring_size), 2)
                 if not torch.cuda.can_device_access_peer(a, b)), None)


def _cuda_devices() -> int:
    if sys.platform == "linux" and not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists():
        return 0  # no driver: not worth importing torch for
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
