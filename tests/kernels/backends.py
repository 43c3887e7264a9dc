"""Every way to compute attention on this machine, as parameters of the conformance suite."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from ringserve_kernels import TILES, KernelUnavailable, Layout, NativeLayout
from ringserve_kernels.gpu.dense import DenseOperation
from ringserve_kernels.native.build import build
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.native.variants import VARIANTS, Variant
from torch import Tensor

EMULATED_TILES = ("-DRINGSERVE_EMULATED_TILES",)
EMULATION_NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16")


@dataclass(frozen=True)
class Backend:
    name: str
    layout: Callable[[torch.dtype, int], Layout]
    """Of queries of this dtype, in blocks of so many tokens."""
    against: str = ""
    """Why it cannot run here."""
    native: bool = False
    blocks: tuple[int, ...] = (1, 5, 16, 64)
    dims: tuple[int, ...] = (16, 32)
    value_dims: tuple[int | None, ...] = (None, None, 24)
    scales_scores: bool = False
    """Quantized keys are what codes and scales say; else they are rounded to the queries' format."""
    slow: bool = False
    """It is interpreted: examples are few and small."""
    bitwise: bool = False
    """A row's result does not depend on what stands beside it in the batch, to the last bit."""

    def __str__(self) -> str:
        return self.name


@cache
def _kernel(variant: Variant, extra: tuple[str, ...]) -> NativeKernel:
    library = build(variant, extra)
    try:
        return NativeKernel(library)
    except KernelUnavailable as error:
        if "does not let this process" in str(error):  # the system's word, not ours
            pytest.skip(str(error))
        raise


def _native(variant: Variant, name: str, extra: tuple[str, ...] = ()) -> Backend:
    missing = variant.missing()
    return Backend(name, lambda dtype, block: NativeLayout(_kernel(variant, extra), block, dtype),
                   f"this CPU has no {', '.join(missing)}" if missing else "", native=True, blocks=(16, 32, 64),
                   dims=(16, 32, 48), value_dims=(None, None, 64), scales_scores=True, bitwise=True)


def _paged(name: str, dense: DenseOperation | None) -> Backend:
    def layout(dtype: torch.dtype, block: int) -> Layout:
        from ringserve_kernels.gpu.layout import PagedLayout

        return PagedLayout(block, dense)

    return Backend(name, layout, _without_interpreter(), blocks=(16, 32), scales_scores=True, slow=True, bitwise=True)


def _without_interpreter() -> str:
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'ringserve[triton]'"
    from ringserve_kernels.triton.arguments import INTERPRETED

    return "" if INTERPRETED else "Triton compiles in this process, and these tests are the CPU's"


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return o, lse


CPU_FLASH = DenseOperation("cpu-flash", _cpu_flash, "torch", "torch", (0, 0))
"""In the place of a GPU's dense operation: how a plan is dealt to it and to Triton is the same."""
TORCH = Backend("torch", lambda dtype, block: TILES)
_AMX = VARIANTS[0]
_NATIVE = [_native(variant, f"native-{variant.name}") for variant in VARIANTS]
_EMULATED = _native(Variant(_AMX.name, EMULATION_NEEDS, _AMX.options), "native-amx-bf16-emulated", EMULATED_TILES)


def _parameter(backend: Backend) -> object:
    return pytest.param(backend, id=backend.name, marks=pytest.mark.skipif(
        bool(backend.against), reason=f"{backend.name}: {backend.against}"))


NATIVE = [_parameter(backend) for backend in (*_NATIVE, _EMULATED)]
ON_CPUS = [_parameter(TORCH), *NATIVE]
BACKENDS = [*ON_CPUS, _parameter(_paged("triton-interpreted", None))]
DENSE = _parameter(_paged("dense-and-triton-interpreted", CPU_FLASH))
"""Where there are long runs; without them it is Triton alone."""
