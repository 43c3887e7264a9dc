"""What a rank measures of its machine at start: attention speed and the link to the next rank."""

import time
from dataclasses import replace

import torch
from ringserve_kernels import Case

from ringserve.model.runner import ModelRunner
from ringserve.ring.group import RingGroup

PROBE_ROWS, PROBE_KEYS = 512, 4096
LINK_BYTES = 1 << 20
ROUNDS = 3


def attention_flops(runner: ModelRunner) -> float:
    """FLOP/s of a chunk's attention in the model's widest-seeing layer, without its window: only then is the work what
    the products of all rows and keys are."""
    number, spec = max(enumerate(layer.spec for layer in runner.layers), key=lambda s: s[1].window or 1 << 62)
    case = Case(replace(spec, window=None), runner.dtype, PROBE_ROWS, PROBE_KEYS, runner.block_size, runner.device)
    run = case.run(runner.layout_of(number))
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        o, _ = run()
        float(o.sum())  # waits for a device
        best = min(best, time.perf_counter() - started)
    return case.flops / best


def link_bytes_per_s(ring: RingGroup, epoch: int, largest_message: int) -> float:
    """Bytes/s when every rank sends to the next at once; 0 in a ring of one. All ranks call it."""
    if ring.size == 1:
        return 0.0
    ring.begin_step(0, epoch)
    size = min(LINK_BYTES, largest_message)
    best = float("inf")
    payload = torch.ones(size, dtype=torch.uint8)

    def fill(buffer: torch.Tensor) -> None:
        buffer.copy_(payload)

    for _ in range(ROUNDS):
        started = time.perf_counter()
        ticket = ring.post(1, size, fill, size)
        int(ring.wait(ticket)[-1])  # waits for a device
        ring.release(ticket)
        best = min(best, time.perf_counter() - started)
    return size / best
