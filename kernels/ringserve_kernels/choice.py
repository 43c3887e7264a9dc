"""Which kernel computes a layer's attention on this machine: decided once, by a race, and said in words.

    forced          taken, or KernelUnavailable
    auto            the first variant of the native kernel that this CPU runs, that compiles, that gives the right
                    answer on a small case, and that is faster than torch's operations; else torch

The answer is checked at each start: a kernel that computes something else on a CPU nobody has tried must not serve. The
race (a second) is remembered per CPU model, shape and library in the user's cache directory.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ringserve_kernels.case import Case
from ringserve_kernels.errors import KernelUnavailable
from ringserve_kernels.native.build import build, cache_directory
from ringserve_kernels.native.layout import NativeLayout
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.native.variants import Variant, cpu_model, runnable
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import backend

Wanted = Literal["auto", "native", "torch"]
BOUND = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 1e-3)}
"""Of the small case: relative RMS of o, and the largest difference of lse."""
CHUNK, DECODE = (256, 4096), (1, 16384)
"""The race's shapes: rows and keys of a chunk of a prompt, and of a decode step."""
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Choice:
    """How a layer is computed."""

    layout: NativeLayout | None
    """None: torch's operations, keys token after token."""
    words: str
    """For the start-up lines: what was chosen and why."""


def choose(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int, wanted: Wanted) -> Choice:
    """Raises KernelUnavailable when the native kernel is wanted and cannot be had."""
    torch_path = " and, where masked, ".join(dict.fromkeys(backend(spec, device, dtype, masked)
                                                            for masked in (False, True)))
    if wanted == "torch":
        return Choice(None, f"{torch_path} (as asked for)")
    against: dict[str, list[str]] = {}
    """Reasons, and the variants of which they hold."""
    refusal = _refusal(spec, dtype, device, block)
    for variant in [] if refusal else runnable():
        try:
            layout = NativeLayout(_kernel(variant), block, dtype)
            _verify(layout, spec, dtype)
        except KernelUnavailable as error:
            against.setdefault(str(error), []).append(variant.name)
            continue
        if wanted == "native":
            return Choice(layout, f"native {variant.name} (as asked for)")
        chunk, decode = _race(layout, spec, dtype)
        times = f"{chunk:.2g} times torch's speed in prefill, {decode:.2g} in decode"
        if chunk * decode > 1:
            return Choice(layout, f"native {variant.name} ({times})")
        against.setdefault(times, []).append(variant.name)
    why = refusal or "; ".join(f"{', '.join(names)}: {reason}" for reason, names in against.items())
    if wanted == "native":
        raise KernelUnavailable(f"the native attention kernel cannot be used: {why}")
    return Choice(None, f"{torch_path} (native kernel not used: {why})")


def _refusal(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int) -> str | None:
    """Why the native kernel is not even tried."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if not runnable():
        return "this CPU has neither AVX2 nor AVX-512"
    return NativeLayout.refusal(spec, dtype, block)


@cache
def _kernel(variant: Variant) -> NativeKernel:
    kernel = NativeKernel(build(variant))
    if not kernel.shares_threads_with_torch():
        raise KernelUnavailable("it would bring a second OpenMP runtime into the process")
    return kernel


def _verify(layout: NativeLayout, spec: AttentionSpec, dtype: torch.dtype) -> None:
    """Raises KernelUnavailable unless a small case comes out right: 37 rows that fill no tile, 300 keys."""
    case = Case(spec, dtype, 37, 300, layout.block)
    (o, lse), (expected_o, expected_lse) = case.run(layout)(), case.expected()
    error = float((o - expected_o).norm() / expected_o.norm())
    lse_error = float((lse - expected_lse).abs().max())
    if not (error <= BOUND[dtype][0] and lse_error <= BOUND[dtype][1]):
        raise KernelUnavailable(f"it is wrong on this CPU: o is off by {error:.1e} of its RMS, lse by {lse_error:.1e}")


def _race(layout: NativeLayout, spec: AttentionSpec, dtype: torch.dtype) -> tuple[float, float]:
    """How many times as fast as torch's operations: (chunk of a prompt, decode step)."""
    key = "|".join(map(str, (cpu_model(), torch.__version__, torch.get_num_threads(), layout.kernel.file.name, dtype,
                             layout.block, spec)))
    path = cache_directory() / "races.json"
    known = _remembered(path)
    if key not in known:
        # The widest view of the layer's shape: a window would make both of them fast.
        cases = [Case(replace(spec, window=None), dtype, rows, keys, layout.block) for rows, keys in (CHUNK, DECODE)]
        known[key] = [_ratio(case, layout) for case in cases]
        _remember(path, known)
    return known[key][0], known[key][1]


def _ratio(case: Case, layout: NativeLayout) -> float:
    native, plain = case.run(layout), case.run(None)
    times = [[_time(run) for run in (native, plain)] for _ in range(ROUNDS)]
    return min(t[1] for t in times) / min(t[0] for t in times)


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _remembered(path: Path) -> dict[str, list[float]]:
    try:
        known = json.loads(path.read_text())
        return {key: ratios for key, ratios in known.items()
                if len(ratios) == 2 and all(math.isfinite(ratio) for ratio in ratios)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(path: Path, known: dict[str, list[float]]) -> None:
    """As well as it goes: a race that is not remembered is run again."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps(known))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
