"""Builds the C++ kernel: seconds at first use, then a file in the user's cache directory."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ringserve_kernels.errors import KernelUnavailable
from ringserve_kernels.native.variants import Variant

SOURCE = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
TIMEOUT_S = 300.0


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/ringserve/kernels or ~/.cache/ringserve/kernels; not necessarily there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringserve" / "kernels"


def build(variant: Variant, extra: tuple[str, ...] = ()) -> Path:
    """The compiled library of a variant, made now if it was not made before from the same sources, compiler and
    options. Raises KernelUnavailable without a compiler, or with the compiler's last words."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise KernelUnavailable("no C++ compiler was found (g++ or clang++, or $CXX)")
    command = [*compiler.split(), *OPTIONS, *variant.options, *extra, f'-DRINGSERVE_VARIANT="{variant.name}"',
               str(SOURCE / "attention.cpp")]
    links = _openmp_of_torch()
    digest = hashlib.sha256("\0".join([_version(compiler), *command, *links]).encode())
    for source in [*sorted(SOURCE.glob("*.h")), SOURCE / "attention.cpp"]:
        digest.update(source.read_bytes())
    target = cache_directory() / f"attention-{variant.name}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _compile(command, links, target)
    return target


def _compile(command: list[str], links: list[str], target: Path) -> None:
    """Under a name of its own, then renamed: ranks that start together may all compile, and none reads half a file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
        os.close(handle)
    except OSError as error:
        raise KernelUnavailable(f"cannot write to {target.parent}: {error.strerror}") from None
    try:
        done = subprocess.run([*command, "-o", name, *links], capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise KernelUnavailable(f"{command[0]} failed: {_last_words(done.stderr)}")
        os.replace(name, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{command[0]} failed: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _last_words(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "error" in line] or stderr.splitlines() or ["no message"]
    return lines[0][:300]


def _version(compiler: str) -> str:
    try:
        return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"{compiler} cannot be run: {error}") from None


def _openmp_of_torch() -> list[str]:
    """Torch's own copy of the OpenMP runtime, where it brings one: two runtimes in a process would fight for cores."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    own = own or sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    return ["-Wl,--as-needed", str(own[0])] if own else []
