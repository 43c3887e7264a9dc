"""What ptxas makes of the kernels, for architectures that need not be here.

    PYTHONPATH=.:kernels python -m tests.kernels.triton.compiled [--all] [--json]

compiles what the host would launch and prints a table. TRITON_INTERPRET must not be set; no GPU is needed.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
import triton
from ringserve_kernels import AttentionSpec, KeyBlocks, RowSpan
from ringserve_kernels.triton import Quantized, page_table
from ringserve_kernels.triton.attend import Storage, attention_launches
from ringserve_kernels.triton.gather import gather_launch
from ringserve_kernels.triton.launch import Launch
from ringserve_kernels.triton.merge import merge_launch
from ringserve_kernels.triton.quantized import quantize_launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURES = (80, 90, 100)
TOKENS, KV_HEADS = 4096, 8


@dataclass(frozen=True)
class Compiled:
    name: str
    arch: int
    registers: int
    spilled_bytes: int
    """Stored to local memory because registers ran out."""
    shared_bytes: int
    wgmma: int
    """Matrix instructions in the PTX: of a warpgroup (sm_90),"""
    tcgen05: int
    """of the tensor memory of sm_100,"""
    mma: int
    """of a warp,"""
    fma: int
    """and products of single fp32 numbers."""


class AbsentGpu:
    """What Triton's just-in-time compiler asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str, launch: Launch, arch: int) -> Compiled:
    """The kernel as Triton compiles it at the first launch on this architecture, by the same path."""
    driver.set_active(AbsentGpu(arch))
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants, **launch.options)
    ptx = kernel.asm["ptx"]
    return Compiled(
        name, arch, _number(r"Used (\d+) registers", log.getvalue()),
        _number(r"(\d+) bytes spill stores", log.getvalue()), kernel.metadata.shared,
        len(re.findall(r"wgmma\.mma_async", ptx)), len(re.findall(r"tcgen05\.mma", ptx)),
        len(re.findall(r"\bmma\.sync", ptx)), len(re.findall(r"\bfma\.rn\.f32", ptx)))


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    assert found, f"ptxas said nothing of {pattern}:\n{log}"
    return int(found[1])


@dataclass(frozen=True)
class Attention:
    """A configuration of paged attention: `rows` of one sequence at the end of its keys."""

    rows: int
    """1 takes tiles of 16 packed rows, 16 of 64 (both split), 512 the wide ones."""
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype | None = None
    dim: int = 128
    value_dim: int | None = None
    group: int = 4
    block_size: int = 64
    window: int | None = None
    softcap: float | None = None

    @property
    def name(self) -> str:
        said = [{1: "decode", 16: "few rows", 512: "prefill"}[self.rows], str(self.cache or self.dtype)[6:],
                f"d{self.dim}" + (f"/{self.value_dim}" if self.value_dim else "")]
        changed = [(f"group {self.group}", self.group != 4), (f"block {self.block_size}", self.block_size != 64),
                   ("window", self.window), ("softcap", self.softcap),
                   (f"{str(self.dtype)[6:]} rows", self.cache and self.dtype != BF16)]
        return " ".join(said + [word for word, is_so in changed if is_so])

    def launches(self, arch: int) -> Iterator[tuple[str, Launch]]:
        spec = AttentionSpec(num_heads=KV_HEADS * self.group, num_kv_heads=KV_HEADS, key_dim=self.dim,
                             value_dim=self.value_dim or self.dim, scale=self.dim**-0.5, window=self.window,
                             softcap=self.softcap)
        first = np.arange(0, TOKENS, self.block_size)
        blocks = KeyBlocks(first, np.full_like(first, self.block_size), first)
        index = np.arange(TOKENS - self.rows, TOKENS)
        table = page_table(self.rows, [(RowSpan(0, index), blocks)], spec, self.block_size, torch.device("cpu"))
        q = empty(self.rows, spec.num_heads, self.dim, dtype=self.dtype)
        k, v = (self._storage(dim) for dim in (self.dim, spec.value_dim))
        launches = attention_launches(q, k, v, table, spec, accumulators(self.rows, spec.num_heads, spec.value_dim),
                                      divmod(arch, 10))
        yield self.name, launches[0]
        for launch in launches[1:]:
            yield f"reduction d{spec.value_dim}", launch

    def _storage(self, dim: int) -> Storage:
        codes = empty(KV_HEADS, TOKENS, dim, dtype=self.cache or self.dtype)
        return codes if self.cache is None else Quantized(codes, empty(KV_HEADS, TOKENS, dtype=torch.float32))


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Only a shape: nothing is launched."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def accumulators(rows: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    return (empty(heads, rows, dim, dtype=torch.float32).transpose(0, 1),
            empty(heads, rows, dtype=torch.float32).transpose(0, 1))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, FP8 = torch.int8, torch.float8_e4m3fn

CHOSEN = (
    Attention(512), Attention(512, dim=64, window=1000), Attention(512, dim=256), Attention(512, cache=FP8),
    Attention(16), Attention(1), Attention(1, cache=INT8), Attention(1, cache=FP8), Attention(1, FP32, dim=64))
"""What `make test` compiles."""

EVERY = tuple(dict.fromkeys((
    *(Attention(rows, dim=dim) for rows in (1, 16, 512) for dim in (64, 80, 96, 128, 256)),
    *(Attention(rows, FP32, dim=dim) for rows in (1, 16, 512) for dim in (64, 128, 256)),
    *(Attention(rows, FP16) for rows in (1, 16, 512)),
    *(Attention(rows, BF16, cache, dim) for rows in (1, 16, 512) for dim in (64, 128, 256) for cache in (INT8, FP8)),
    *(Attention(rows, FP16, cache) for rows in (1, 512) for cache in (INT8, FP8)),
    *(Attention(rows, group=group) for rows in (1, 512) for group in (1, 8)),
    *(Attention(rows, block_size=block) for rows in (1, 512) for block in (16, 256)),
    *(Attention(rows, dim=dim, window=1000, softcap=softcap) for rows in (1, 16, 512) for dim in (64, 128, 256)
      for softcap in (None, 50.0)),
    *(Attention(rows, dim=192, value_dim=128) for rows in (1, 16, 512)), *CHOSEN)))
"""What `make test-long` compiles."""


def others() -> Iterator[tuple[str, Launch]]:
    """The launches that are the same on every architecture."""
    blocks = torch.zeros(8, dtype=torch.int32)
    for dim in (64, 80, 128, 256):
        state, other = accumulators(64, 32, dim), accumulators(64, 32, dim)
        yield f"merge d{dim}", merge_launch(*state, *other)
        storage = empty(KV_HEADS, TOKENS, dim, dtype=BF16)
        yield f"gather d{dim}", gather_launch(storage, blocks, blocks, 64, empty(KV_HEADS, 512, dim, dtype=BF16))
        for codes in (INT8, FP8):
            cache = Quantized(empty(KV_HEADS, TOKENS, dim, dtype=codes), empty(KV_HEADS, TOKENS, dtype=FP32))
            new = empty(64, KV_HEADS, dim, dtype=BF16)
            yield f"write {str(codes)[6:]} d{dim}", quantize_launch(new, empty(64, dtype=torch.int64), cache)


def launches(arch: int, every: bool) -> dict[str, Launch]:
    """By name: kernels that several configurations share appear once."""
    found = dict(pair for configuration in (EVERY if every else CHOSEN) for pair in configuration.launches(arch))
    return found | {name: launch for name, launch in others() if every or name.endswith("d128")}


COLUMNS = ("kernel", "sm", "registers", "spilled bytes", "shared bytes", "wgmma", "tcgen05.mma", "mma.sync", "fma")


def main() -> None:
    """Print a table, or with `--json` one object a line."""
    # What ptxas says is printed by Triton when it compiles, not when it finds a kernel in its cache.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    as_json = "--json" in sys.argv
    if not as_json:
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for arch in ARCHITECTURES:
        for name, launch in launches(arch, "--all" in sys.argv).items():
            values = asdict(compiled(name, launch, arch))
            print(json.dumps(values) if as_json else f"| {' | '.join(map(str, values.values()))} |", flush=True)


if __name__ == "__main__":
    main()
