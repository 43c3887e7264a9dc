"""Every way to compute attention on this machine, as parameters of the conformance suite."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from ringserve_kernels import KernelUnavailable, NativeLayout
from ringserve_kernels.native.build import build
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.native.variants import VARIANTS, Variant

EMULATED_TILES = ("-DRINGSERVE_EMULATED_TILES",)
EMULATION_NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16")


@dataclass(frozen=True)
class Backend:
    name: str
    variant: Variant | None = None
    """None: torch's operations."""
    extra: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        return self.variant is not None

    def layout(self, dtype: torch.dtype, block: int) -> NativeLayout | None:
        if self.variant is None:
            return None
        return NativeLayout(_kernel(self.variant, self.extra), block, dtype)

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


TORCH = Backend("torch")
_AMX = VARIANTS[0]
_NATIVE = [Backend(f"native-{variant.name}", variant) for variant in VARIANTS]
_EMULATED = Backend("native-amx-bf16-emulated",
                    Variant(_AMX.name, EMULATION_NEEDS, _AMX.options), EMULATED_TILES)


def _parameter(backend: Backend) -> object:
    missing = backend.variant.missing() if backend.variant else []
    return pytest.param(backend, id=backend.name, marks=pytest.mark.skipif(
        bool(missing), reason=f"{backend.name}: this CPU has no {', '.join(missing)}"))


NATIVE = [_parameter(backend) for backend in (*_NATIVE, _EMULATED)]
BACKENDS = [_parameter(TORCH), *NATIVE]
