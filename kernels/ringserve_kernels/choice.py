"""What computes a layer's attention on this machine: decided once, by a race, and said in words.

    asked for       taken, or KernelUnavailable
    auto, CPU       the first variant of the native kernel that this CPU runs, that compiles, that gives the right
                    answer on small cases, and that is faster than torch's operations; else torch's
    auto, GPU       Triton's kernels, alone or beside the dense operation that gives the right answer and is fastest;
                    torch's operations where Triton is missing

The answer is checked at each start: a kernel that computes something else on a machine nobody has tried must not serve.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from ringserve_kernels.case import Case
from ringserve_kernels.errors import ArgumentError, KernelUnavailable
from ringserve_kernels.layout import Layout
from ringserve_kernels.native.build import build
from ringserve_kernels.native.layout import NativeLayout
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.native.variants import Variant, runnable
from ringserve_kernels.race import race
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import backend
from ringserve_kernels.tile_layout import TILES

Wanted = Literal["auto", "native", "torch", "triton", "cudnn", "fa2", "fa3", "fa4", "flash", "efficient"]
BOUND = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 1e-3), torch.float16: (5e-3, 1e-3)}
"""Of the small cases: relative RMS of o, and the largest difference of lse."""
Shapes = tuple[tuple[int, int], ...]
"""(rows, keys) each."""
CHECKED: Shapes = ((37, 300),)
"""Rows that fill no tile."""
CHUNK, DECODE = (256, 4096), (1, 16384)
"""The race's shapes on a CPU: a chunk of a prompt, and a decode step."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a layer is computed."""

    layout: Layout
    words: str
    """For the start-up lines: what was chosen and why."""


class Against:
    """Why contenders are not used."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        """By reason."""

    def add(self, name: str, reason: str) -> None:
        self._names.setdefault(reason, []).append(name)

    def __str__(self) -> str:
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in self._names.items())


def choose(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int, wanted: Wanted,
           quantized: bool = False) -> Choice:
    """`quantized`: keys and values will be codes. Raises KernelUnavailable when what is wanted cannot be had."""
    if wanted == "torch":
        return Choice(TILES, f"{torch_path(spec, dtype, device)} (as asked for)")
    if device.type == "cuda":
        from ringserve_kernels.gpu.choice import choose_on_gpu  # brings Triton

        return choose_on_gpu(spec, dtype, device, block, wanted, quantized)
    if wanted not in ("auto", "native"):
        raise KernelUnavailable(f"attention by {wanted} is for GPUs, not {device.type}")
    return _choose_on_cpu(spec, dtype, device, block, forced=wanted == "native")


def _choose_on_cpu(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int, forced: bool) -> Choice:
    against = Against()
    refusal = _refusal(spec, dtype, device, block)
    for variant in [] if refusal else runnable():
        try:
            layout = NativeLayout(_kernel(variant), block, dtype)
            verify(layout, spec, dtype, block, device, CHECKED)
        except KernelUnavailable as error:
            against.add(variant.name, str(error))
            continue
        if forced:
            return Choice(layout, f"{layout.name} (as asked for)")
        own = layout.kernel.file.name
        times = race({"torch": TILES, own: layout}, spec, dtype, block, device, (CHUNK, DECODE))
        chunk, decode = (theirs / ours for theirs, ours in zip(times["torch"], times[own]))
        words = f"{chunk:.2g} times torch's speed in prefill, {decode:.2g} in decode"
        if chunk * decode > 1:
            return Choice(layout, f"{layout.name} ({words})")
        against.add(variant.name, words)
    if forced:
        raise KernelUnavailable(f"the native attention kernel cannot be used: {refusal or against}")
    return Choice(TILES, f"{torch_path(spec, dtype, device)} (native kernel not used: {refusal or against})")


def _refusal(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int) -> str | None:
    """Why the native kernel is not even tried."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if not runnable():
        return "this CPU has neither AVX2 nor AVX-512"
    return NativeLayout.refusal(spec, dtype, block)


def verify(layout: Layout, spec: AttentionSpec, dtype: torch.dtype, block: int, device: torch.device,
           shapes: Shapes) -> None:
    """Raises KernelUnavailable unless cases of these shapes come out right."""
    for rows, keys in shapes:
        case = Case(spec, dtype, rows, keys, block, device)
        expected_o, expected_lse = case.expected()
        try:
            o, lse = (x.cpu() for x in case.run(layout)())
        except (ArgumentError, RuntimeError, TypeError, ImportError) as error:  # of a library that we only wrap
            raise KernelUnavailable(f"it fails here: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        off = float((o - expected_o).norm() / expected_o.norm())
        lse_off = float((lse - expected_lse).abs().max())
        if not (off <= BOUND[dtype][0] and lse_off <= BOUND[dtype][1]):
            raise KernelUnavailable(f"it is wrong here: o is off by {off:.1e} of its RMS, lse by {lse_off:.1e}")


def torch_path(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str:
    return " and, where masked, ".join(dict.fromkeys(backend(spec, device, dtype, masked) for masked in (False, True)))


@cache
def _kernel(variant: Variant) -> NativeKernel:
    kernel = NativeKernel(build(variant))
    if not kernel.shares_threads_with_torch():
        raise KernelUnavailable("it would bring a second OpenMP runtime into the process")
    return kernel
