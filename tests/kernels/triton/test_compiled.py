"""Every kernel, compiled ahead of time for GPUs that need not be here: registers, shared memory, matrix instructions.

In a process of its own, because in this one the kernels may be interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that one block of threads may use (CUDA C++ Programming Guide, technical specifications per compute
capability)."""
SPILLED_BYTES = 32
"""That a thread may spill: ptxas spills a few registers where that lets another block of threads run beside it."""
SPILLS = "float32"
"""fp32 is for checks: its products need more registers than there are."""
EMPTY = 8
"""Registers of a kernel of which the compiler left nothing: seen with Triton 3.7.1, without a word."""
TIMEOUT_S = 1800

Kernels = list[dict[str, int | str]]


def compile_all(tmp_path: Path, *arguments: str) -> Kernels:
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-m", "tests.kernels.triton.compiled", "--json", *arguments],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
                          timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: Kernels) -> None:
    assert {kernel["arch"] for kernel in kernels} == SHARED_MEMORY.keys()
    wrong = []
    for kernel in kernels:
        name, arch = str(kernel["name"]), int(kernel["arch"])
        if int(kernel["shared_bytes"]) > SHARED_MEMORY[arch]:
            wrong.append(f"{name} sm_{arch}: {kernel['shared_bytes']} bytes of shared memory")
        if int(kernel["registers"]) <= EMPTY:
            wrong.append(f"{name} sm_{arch}: {kernel['registers']} registers, so it is empty")
        if int(kernel["spilled_bytes"]) > SPILLED_BYTES and SPILLS not in name:
            wrong.append(f"{name} sm_{arch}: {kernel['spilled_bytes']} bytes spilled")
        if not kernel[instruction(name, arch)] and name.startswith(("prefill", "few rows", "decode")):
            wrong.append(f"{name} sm_{arch}: no {instruction(name, arch)}")
    assert not wrong, "\n".join(wrong)


def instruction(name: str, arch: int) -> str:
    """What multiplies: tiles of 16 rows are too small for a warpgroup's instruction, or for tensor memory; on sm_100
    fp32 numbers are multiplied one by one."""
    if arch == 100 and SPILLS in name:
        return "fma"
    return "mma" if arch == 80 or name.startswith("decode") else "wgmma" if arch == 90 else "tcgen05"


def test_the_kernels_of_usual_models(tmp_path: Path) -> None:
    check(compile_all(tmp_path))


@pytest.mark.long
def test_the_kernels_of_every_configuration(tmp_path: Path) -> None:
    check(compile_all(tmp_path, "--all"))
