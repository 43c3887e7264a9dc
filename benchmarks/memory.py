"""Resident memory of the ranks against the length of the prompt: activations must not grow with it.

    python benchmarks/memory.py --tokens 32768 131072 524288

Prints, per length, each rank's peak resident memory, the part of it that is the prompt's own KV cache, and the rest.
"""

import argparse
from pathlib import Path

from ringserve_api.demo import DEPTHS, Haystack

from ringserve import LLM, SamplingParams

MIB = 1 << 20


def peak_rss(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072, 524_288])
    parser.add_argument("--ring-size", type=int, default=2)
    parser.add_argument("--ring-mode", choices=["auto", "pass-kv", "pass-q"], default="auto")
    args = parser.parse_args()
    for tokens in args.tokens:
        with LLM("needle", ring_size=args.ring_size, ring_mode=args.ring_mode, kv_cache_gib=2.0) as llm:
            idle = [peak_rss(pid) for pid in llm.info.pids[1:]]
            haystack = Haystack(llm.tokenizer, tokens, DEPTHS[:1])
            prompt = llm.tokenizer.encode(haystack.text + haystack.questions[0])
            [result] = llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=32, temperature=0))
            if not result.outputs[0].text.startswith(haystack.expected(0, 30)):
                raise SystemExit(f"wrong answer: {result.outputs[0].text!r}")
            peaks = [peak_rss(pid) for pid in llm.info.pids[1:]]
        kv = tokens * llm.info.kv_bytes_per_token // args.ring_size
        rest = [peak - kv for peak in peaks]
        print(f"{tokens:9,} tokens: peak of each rank {', '.join(f'{p / MIB:,.0f}' for p in peaks)} MiB; "
              f"KV {kv / MIB:,.0f}; the rest {', '.join(f'{r / MIB:,.0f}' for r in rest)} "
              f"(idle after loading: {', '.join(f'{i / MIB:,.0f}' for i in idle)})", flush=True)


if __name__ == "__main__":
    main()
