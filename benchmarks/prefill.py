"""Prefill and decode speed of needle over rings of several sizes, in turns, every answer checked.

    python benchmarks/prefill.py --tokens 131072 --rings 1 2 --rounds 3

Machines are noisy: each round runs every configuration once, and the table gives medians over the rounds and the
ratio to the first configuration. A run whose answer is wrong ends the benchmark.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

from ringserve_api.demo import DEPTHS, Haystack

from ringserve import LLM, SamplingParams
from ringserve.outputs import RequestOutput

OUTPUT_TOKENS = 33


@dataclass(frozen=True)
class Reading:
    prefill_s: float
    decode_ms: float


def measure(llm: LLM, haystack: Haystack, number: int) -> Reading:
    question = haystack.questions[number]
    prompt = llm.tokenizer.encode(haystack.text + question)
    first: list[float] = []

    def watch(_: int, output: RequestOutput) -> None:
        if output.token_ids and not first:
            first.append(time.perf_counter())

    started = time.perf_counter()
    [result] = llm.generate({"prompt_token_ids": prompt}, SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True), on_progress=watch)
    ended = time.perf_counter()
    expected = haystack.expected(number, 32)
    if not result.outputs[0].text.startswith(expected):
        raise SystemExit(f"wrong answer: expected {expected!r}, got {result.outputs[0].text!r}")
    return Reading(first[0] - started, (ended - first[0]) / (OUTPUT_TOKENS - 1) * 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--rings", type=int, nargs="+", default=[1, 2], help="ring sizes")
    parser.add_argument("--modes", nargs="+", default=["auto"], choices=["auto", "pass-kv", "pass-q"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=None, help="max_chunk_tokens; default: the server's")
    args = parser.parse_args()
    options = {"max_chunk_tokens": args.chunk} if args.chunk else {}
    configurations = [(ring, mode) for ring in args.rings for mode in (args.modes if ring > 1 else ["auto"])]
    readings: dict[tuple[int, str], list[Reading]] = {c: [] for c in configurations}
    haystack: Haystack | None = None
    for round_ in range(args.rounds):
        for ring, mode in configurations:
            with LLM("needle", ring_size=ring, ring_width=ring, ring_mode=mode, prefix_cache=False,
                     **options) as llm:
                haystack = haystack or Haystack(llm.tokenizer, args.tokens, DEPTHS)
                measure(llm, Haystack(llm.tokenizer, 4096, DEPTHS), 0)  # first use of every path
                reading = measure(llm, haystack, round_ % len(DEPTHS))
            readings[ring, mode].append(reading)
            print(f"round {round_ + 1}: ring {ring} {mode}: prefill {reading.prefill_s:.2f} s, "
                  f"decode {reading.decode_ms:.1f} ms/token", flush=True)
    print(f"\n{args.tokens:,} tokens, medians of {args.rounds} rounds")
    base = statistics.median(r.prefill_s for r in readings[configurations[0]])
    for (ring, mode), rows in readings.items():
        prefill = statistics.median(r.prefill_s for r in rows)
        decode = statistics.median(r.decode_ms for r in rows)
        print(f"ring {ring} {mode:8} prefill {prefill:7.2f} s  {args.tokens / prefill:9,.0f} tok/s  "
              f"x{prefill / base:.2f} of the first  decode {decode:6.1f} ms/token")


if __name__ == "__main__":
    main()
