"""ringserve beside other engines on the same model directory, in turns within one run: medians and ratios.

    python benchmarks/peers.py MODEL 2048 32768 --rings 1 2 --rounds 3 --peer "vllm=PYTHON vllm_cpu.py"

A peer is a command that takes MODEL and the sizes and prints, for each size, a line with `n=SIZE`, `prefill X s` and
`decode Y ms`. Before anything is timed, `ringserve selftest MODEL` must pass: our figures are
of answers that are right. Prompts are random tokens; nothing is cached from prompt to
prompt.
"""

import argparse
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from report import report

from ringserve import LLM, SamplingParams
from ringserve.outputs import RequestOutput

OUTPUT_TOKENS = 33
LINE = re.compile(r"n=(\d+)\b.*?prefill ([\d.]+) s.*?decode ([\d.]+) ms")
OWN = "ringserve"


def measure(model: str, sizes: list[int], ring: int, options: dict[str, Any]) -> None:
    """In a process of its own, as the peers are: prints a line per size."""
    rng = random.Random(0)
    with LLM(model, ring_size=ring, ring_width=ring, prefix_cache=False, max_model_len=max(*sizes, 8192) + 256,
             **options) as llm:
        ask(llm, [rng.randrange(2, 4000) for _ in range(256)])  # first use of every path
        for size in sizes:
            prefill, decode = ask(llm, [rng.randrange(2, 4000) for _ in range(size)])
            print(f"ringserve n={size} prefill {prefill:.3f} s decode {decode * 1000:.2f} ms/tok", flush=True)


def ask(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    first: list[float] = []

    def watch(_: int, output: RequestOutput) -> None:
        if output.token_ids and not first:
            first.append(time.perf_counter())

    started = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True), on_progress=watch)
    return first[0] - started, (time.perf_counter() - first[0]) / (OUTPUT_TOKENS - 1)


def readings(command: list[str]) -> dict[int, tuple[float, float]]:
    """(prefill seconds, decode ms) by size."""
    done = subprocess.run(command, capture_output=True, text=True)
    found = {int(n): (float(prefill), float(decode)) for n, prefill, decode in LINE.findall(done.stdout)}
    if done.returncode or not found:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--max-step-ms", type=float, default=None,
                        help="default: the server's own, in which others need not wait for a whole chunk")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--own", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = {"attention": args.attention, "kv_cache_dtype": args.kv_cache_dtype, "max_step_ms": args.max_step_ms}
    if args.own:
        measure(args.model, args.sizes, args.own, options)
        return
    check = subprocess.run([sys.executable, "-m", "ringserve_api.cli", "selftest", args.model, "--ring-size", "2"],
                           capture_output=True, text=True)
    print(check.stdout[-1500:])
    if check.returncode:
        raise SystemExit(f"the self-test failed, nothing is timed: {check.stderr[-1000:]}")
    sizes = [str(size) for size in args.sizes]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    commands = {f"{OWN}, ring {ring}": [sys.executable, __file__, args.model, *sizes, "--own", str(ring), *flags]
                for ring in args.rings}
    for peer in args.peer:
        name, _, command = peer.partition("=")
        commands[name] = [*shlex.split(command), args.model, *sizes]
    times: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for round_ in range(args.rounds):
        for name, command in commands.items():
            for size, reading in readings(command).items():
                times[name, size].append(reading)
                print(f"round {round_ + 1}: {name} n={size} prefill {reading[0]:.2f} s, decode {reading[1]:.1f} ms",
                      flush=True)
    rows = []
    for size in args.sizes:
        medians = {name: [statistics.median(column) for column in zip(*times[name, size])] for name in commands}
        best = [min(medians[name][i] for name in commands if name.startswith(OWN)) for i in (0, 1)]
        for name, (prefill, decode) in medians.items():
            rows.append({"tokens": size, "engine": name, "prefill s": round(prefill, 2),
                         "tokens/s": round(size / prefill), "decode ms": round(decode, 1),
                         "our best prefill, times as fast": round(prefill / best[0], 2),
                         "our best decode, share of its time": round(best[1] / decode, 2)})
    report(f"{Path(args.model).name}, bf16, medians of {args.rounds} rounds in turns", list(rows[0]), rows, args.json)


if __name__ == "__main__":
    main()
