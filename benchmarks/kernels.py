"""The native attention kernel against torch's operation and the machine's own limits, in turns, every result checked.

    python benchmarks/kernels.py --rounds 5 --json kernels.json

Prefill is quoted in GFLOP/s beside the large bf16 matmul of the same run (what these cores can multiply), decode in
GB/s of keys and values beside a sum over 4 GiB (what they can read). A result that is not the reference's ends it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import report
from ringserve_kernels import AttentionSpec, Case, choose

CPU = torch.device("cpu")
SHAPES = {"smol135": (9, 3, 64), "needle": (2, 1, 64), "qwen06": (16, 8, 128), "llama 8b": (32, 8, 128)}
BLOCK = 64
BOUND = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}
MATMUL = 4096
READ_BYTES = 4 << 30


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def checked(spec: AttentionSpec, dtype: torch.dtype, kernel: str) -> None:
    """The kernel on a case that is small enough for the oracle."""
    layout = choose(spec, dtype, CPU, BLOCK, kernel).layout  # type: ignore[arg-type]
    case = Case(spec, dtype, 70, 1000, BLOCK)
    o, _ = case.run(layout)()
    expected, _ = case.expected()
    error = float((o - expected).norm() / expected.norm())
    if not error <= BOUND[dtype]:
        raise SystemExit(f"{kernel} is wrong: {error:.1e} of the RMS, at most {BOUND[dtype]:.1e}")


def compare(model: str, spec: AttentionSpec, dtype: torch.dtype, rows: int, keys: int, memory: torch.Tensor,
            rounds: int) -> dict[str, Any]:
    """One line of the table: native, torch and the machine's limit in turns."""
    case = Case(spec, dtype, rows, keys, BLOCK)
    a, b = (torch.randn(MATMUL, MATMUL).to(dtype) for _ in range(2))
    runs: dict[str, Callable[[], object]] = {"limit": memory.sum if rows == 1 else lambda: a @ b}
    for kernel in ("native", "torch"):
        checked(spec, dtype, kernel)
        runs[kernel] = case.run(choose(spec, dtype, CPU, BLOCK, kernel).layout)  # type: ignore[arg-type]
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {kernel: [] for kernel in runs}
    for _ in range(rounds):
        for kernel, run in runs.items():
            times[kernel].append(seconds(run))
    return figures(model, case, {kernel: statistics.median(taken) for kernel, taken in times.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice, all cores")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--keys", type=int, default=32_768)
    parser.add_argument("--decode-keys", type=int, default=131_072)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    memory = torch.zeros(READ_BYTES // 8, dtype=torch.int64)
    rows = [compare(model, AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5), getattr(torch, name), count, keys,
                    memory, args.rounds)
            for name in args.dtypes for model, (heads, kv_heads, dim) in SHAPES.items()
            for count, keys in ((args.rows, args.keys), (1, args.decode_keys))]
    report(f"attention kernels, medians of {args.rounds} rounds, {torch.get_num_threads()} threads",
           list(rows[0]), rows, args.json)


def figures(model: str, case: Case, times: dict[str, float]) -> dict[str, Any]:
    spec, element = case.spec, case.dtype.itemsize
    if case.rows == 1:
        unit, limit = "GB/s", READ_BYTES / 1e9 / times["limit"]
        work = 2.0 * spec.num_kv_heads * case.keys * spec.key_dim * element / 1e9
    else:
        unit, limit = "GFLOP/s", 2.0 * MATMUL**3 / 1e9 / times["limit"]
        # The rows are the last of the keys: of the last square they see half.
        work = case.flops * (1 - case.rows / case.keys / 2) / 1e9
    native, plain = work / times["native"], work / times["torch"]
    return {"shape": f"{model} {spec.num_heads}/{spec.num_kv_heads} x {spec.key_dim}",
            "dtype": str(case.dtype).removeprefix("torch."), "rows x keys": f"{case.rows} x {case.keys:,}",
            "unit": unit, "native": round(native, 1), "torch": round(plain, 1), "limit": round(limit, 1),
            "native/limit": round(native / limit, 2), "native/torch": round(native / plain, 2)}


if __name__ == "__main__":
    main()
