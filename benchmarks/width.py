"""What a short prompt costs on a ring that has more ranks than it needs, against a ring of one; answers compared.

    python benchmarks/width.py --rings 1 4 --rounds 3

Every rank has one thread, so one rank alone is the same machine in both. The rings take turns; medians over all.
"""

import argparse
import statistics
import time

from ringserve import LLM, SamplingParams
from ringserve.outputs import RequestOutput

OUTPUT_TOKENS = 32


def measure(llm: LLM, tokens: int, count: int, seed: int) -> tuple[list[float], list[float], list[list[int]]]:
    """(seconds to the first token, seconds in all, outputs) of so many prompts, one after the other."""
    firsts, wholes, outputs = [], [], []
    for number in range(count):
        ids = [(seed * 7919 + number * 104_729 + i * i * 31) % 6000 + 64 for i in range(tokens)]
        seen: list[float] = []

        def watch(_: int, output: RequestOutput, seen: list[float] = seen) -> None:
            if output.token_ids and not seen:
                seen.append(time.perf_counter())

        started = time.perf_counter()
        [result] = llm.generate({"prompt_token_ids": ids}, SamplingParams(
            max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True), on_progress=watch)
        wholes.append(time.perf_counter() - started)
        firsts.append(seen[0] - started)
        outputs.append(result.outputs[0].token_ids)
    return firsts, wholes, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    firsts: dict[int, list[float]] = {ring: [] for ring in args.rings}
    wholes: dict[int, list[float]] = {ring: [] for ring in args.rings}
    for round_ in range(args.rounds):
        answers = []
        for ring in args.rings:
            with LLM("needle", ring_size=ring, threads_per_rank=1, kv_cache_gib=0.2) as llm:
                measure(llm, args.tokens, 5, seed=999)  # first use of every path
                first, whole, outputs = measure(llm, args.tokens, args.count, seed=round_)
            firsts[ring] += first
            wholes[ring] += whole
            answers.append(outputs)
        if any(outputs != answers[0] for outputs in answers):
            raise SystemExit("the rings gave different answers")
    base = args.rings[0]
    for ring in args.rings:
        first, whole = statistics.median(firsts[ring]), statistics.median(wholes[ring])
        print(f"ring of {ring}: {args.tokens} tokens, first token {first * 1000:.2f} ms "
              f"(x{first / statistics.median(firsts[base]):.3f}), with {OUTPUT_TOKENS} tokens out "
              f"{whole * 1000:.1f} ms (x{whole / statistics.median(wholes[base]):.3f})")


if __name__ == "__main__":
    main()
