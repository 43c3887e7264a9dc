"""Variants: what the C++ kernel can be compiled as, and which of them this CPU runs."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    needs: tuple[str, ...]
    """Names as in /proc/cpuinfo."""
    options: tuple[str, ...]
    """Of g++ or clang++."""

    def missing(self) -> list[str]:
        """What it needs and this CPU has not."""
        return [flag for flag in self.needs if flag not in cpu_flags()]


def _machine(*names: str) -> tuple[str, ...]:
    return tuple(f"-m{name}" for name in names)


VARIANTS = (
    Variant("amx-bf16", (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
            (*_machine(*AVX512, "avx512bf16", "amx-tile", "amx-bf16"), "-DRINGSERVE_TILES")),
    Variant("avx512-bf16", (*AVX512, "avx512_bf16"), _machine(*AVX512, "avx512bf16")),
    Variant("avx512", AVX512, _machine(*AVX512)),
    Variant("avx2", ("avx2", "fma"), _machine("avx2", "fma")),
)
"""The most capable first."""


@cache
def cpu_flags() -> frozenset[str]:
    """Features of this CPU that the kernel may use: none where the system does not list them in /proc/cpuinfo."""
    return frozenset(_cpuinfo("flags").split())


@cache
def cpu_model() -> str:
    return _cpuinfo("model name") or "unknown CPU"


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split("\t")[0].strip() == field), "")


def runnable() -> list[Variant]:
    """Variants that this CPU runs, the most capable first."""
    return [variant for variant in VARIANTS if not variant.missing()]
