"""Short requests beside long ones on a real server: what each of them waits, every answer checked.

    python benchmarks/mixed.py --tokens 131072 --shorts 100 --rate 1 --max-step-ms 100

One run of one server, in this order: short requests alone, a long one alone, short ones (Poisson) while long ones run
back to back, and different questions about one long text, the first cold and the rest from the prefix cache. A wrong
answer ends the benchmark. `--bookkeeping` times the scheduler alone instead, without a model.
"""

import argparse
import asyncio
import random
import statistics
import sysconfig
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from ringserve_api.demo import Haystack, running_server

from ringserve.async_engine import resolve_model
from ringserve.tokenizer import Tokenizer

SHORT_TOKENS, SHORT_OUTPUT = 256, 32
DEPTHS = (0.03, 0.17, 0.31, 0.44, 0.58, 0.71, 0.85, 0.97)
ETA_FROM_PERCENT = 10.0


@dataclass
class Seen:
    """What a client saw of one request, in seconds from sending it."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float = 0.0
    end_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    etas: list[tuple[float, float, float]] = field(default_factory=list)
    """(when, percent, predicted seconds to the first token)"""

    def eta_errors(self) -> list[float]:
        return [abs(eta - (self.first_token_s - at)) / max(self.first_token_s - at, 0.1)
                for at, percent, eta in self.etas if percent >= ETA_FROM_PERCENT and at < self.first_token_s]


async def ask(client: Any, prompt: str, expected: str, output: int, salt: str) -> Seen:
    """One streamed completion; SystemExit when the answer is wrong."""
    seen, text = Seen(), ""
    started = last = time.perf_counter()
    stream = await client.completions.create(
        model="needle", prompt=prompt, max_tokens=output, temperature=0, stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_progress": True, "ignore_eos": True, "cache_salt": salt})
    async for chunk in stream:
        now = time.perf_counter()
        progress = getattr(chunk, "prompt_progress", None)
        if progress is not None and progress["eta_ms"] is not None:
            seen.etas.append((now - started, progress["percent"], progress["eta_ms"] / 1000))
        if chunk.choices and chunk.choices[0].text:
            if not text:
                seen.first_token_s = now - started
            else:
                seen.gaps_s.append(now - last)
            last = now
            text += chunk.choices[0].text
        if chunk.usage is not None:
            seen.prompt_tokens = chunk.usage.prompt_tokens
            seen.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens
    seen.end_s = time.perf_counter() - started
    if not text.startswith(expected):
        raise SystemExit(f"wrong answer: expected {expected!r}, got {text!r}")
    return seen


class Shorts:
    """Short prompts of real text, each with a code of its own to find."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._rng = tokenizer, random.Random(seed)
        self._ids = tokenizer.encode(_library(600_000), allow_special=False)

    def next(self) -> tuple[str, str]:
        """(prompt, how its answer begins)"""
        code = "-".join(str(self._rng.randrange(10**6, 10**7)) for _ in range(2))
        fact, question = f"\nThe secret code of Tom is {code}.\n", "\nThe secret code of Tom is"
        room = SHORT_TOKENS - len(self._tokenizer.encode(fact)) - len(self._tokenizer.encode(question))
        at = self._rng.randrange(len(self._ids) - room)
        half = self._rng.randrange(room)
        before, after = (self._tokenizer.decode(self._ids[a:b]) for a, b in ((at, at + half), (at + half, at + room)))
        return before + fact + after + question, f" {code}."


def _library(characters: int) -> str:
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(parts[-1])
        if size > characters:
            break
    return "".join(parts)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def poisson(client: Any, shorts: Shorts, count: int, rate: float, seed: int) -> list[Seen]:
    """`count` short requests, sent at random moments whatever has become of the earlier ones."""
    rng = random.Random(seed)
    tasks = []
    for number in range(count):
        prompt, expected = shorts.next()
        tasks.append(asyncio.create_task(ask(client, prompt, expected, SHORT_OUTPUT, f"short-{seed}-{number}")))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def say_shorts(console: Console, name: str, seen: Sequence[Seen]) -> None:
    first = [s.first_token_s * 1000 for s in seen]
    gaps = [gap * 1000 for s in seen for gap in s.gaps_s]
    console.print(f"{name}: {len(seen)} short requests, first token p50 {quantile(first, 0.5):.0f} ms, "
                  f"p99 {quantile(first, 0.99):.0f} ms; gap between tokens p50 {quantile(gaps, 0.5):.1f} ms, "
                  f"p99 {quantile(gaps, 0.99):.1f} ms, longest {max(gaps):.0f} ms", highlight=False)


async def measure(console: Console, url: str, args: argparse.Namespace) -> None:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=7200, max_retries=0)
    tokenizer = Tokenizer(resolve_model("needle"))
    shorts = Shorts(tokenizer, args.seed)
    console.print(f"building a text of {args.tokens:,} tokens")
    text = Haystack(tokenizer, args.tokens, DEPTHS)

    async def long(number: int, salt: str) -> Seen:
        question = text.questions[number % len(text.questions)]
        return await ask(client, text.text + question, text.expected(number % len(text.questions), 12), 12, salt)

    await poisson(client, shorts, 5, 5.0, 1)  # first use of every path
    idle = await poisson(client, shorts, args.idle_shorts, args.rate * 2, 2)
    say_shorts(console, "idle", idle)
    service = statistics.median(s.end_s for s in idle)
    alone = await long(0, "alone")
    console.print(f"long alone: {alone.prompt_tokens:,} tokens, first token after {alone.first_token_s:.1f} s",
                  highlight=False)

    beside = asyncio.create_task(poisson(client, shorts, args.shorts, args.rate, 3))
    longs: list[Seen] = []
    finished_beside: list[bool] = []
    while not beside.done():
        longs.append(await long(len(longs), f"mixed-{len(longs)}"))
        finished_beside.append(not beside.done())
    mixed = await beside
    say_shorts(console, "beside long ones", mixed)
    before, beside_p99 = (quantile([s.first_token_s for s in seen], 0.99) * 1000 for seen in (idle, mixed))
    console.print(f"  p99 of the first token against idle: {beside_p99 - before:+.0f} ms (wanted: at most +200)",
                  highlight=False)
    for seen, whole in zip(longs, finished_beside):
        own = args.rate * seen.first_token_s * service if whole else float("nan")
        console.print(f"  long: {seen.first_token_s:.1f} s, {seen.first_token_s / alone.first_token_s:.2f} of alone"
                      + (f", {seen.first_token_s / (alone.first_token_s + own):.2f} of alone and the short ones' own "
                         f"{own:.1f} s (wanted: at most 1.25)" if whole else " (short ones ended before it)"),
                      highlight=False)
    errors = [error for seen in (*longs, *mixed, alone) for error in seen.eta_errors()]
    console.print(f"ETA, from {ETA_FROM_PERCENT:g}% on: median error {quantile(errors, .5):.1%}, p90 "
                  f"{quantile(errors, .9):.1%}, {len(errors)} reports (wanted: 10%, 25%)", highlight=False)

    cold = await long(0, "questions")
    warm = list(await asyncio.gather(*(long(number, "questions") for number in range(1, 8))))
    console.print(f"eight questions about one text: the first {cold.first_token_s:.2f} s; the others, at once, "
                  f"{quantile([w.first_token_s for w in warm], .5):.2f} s median, "
                  f"{max(w.first_token_s for w in warm):.2f} s worst = "
                  f"{max(w.first_token_s for w in warm) / cold.first_token_s:.1%} of it (wanted: under 3%); "
                  f"{min(w.cached_tokens for w in warm):,} of {warm[0].prompt_tokens:,} tokens cached", highlight=False)


def bookkeeping(console: Console) -> None:
    """schedule + update + encoding of the plan with 256 decoding requests, beside a table of a million tokens."""
    import msgspec

    from ringserve.config import SchedulerConfig
    from ringserve.plan import ModelOutput, SampledTokens
    from ringserve.simulate.hardware import HARDWARE
    from ringserve.simulate.simulation import Simulation
    from ringserve.simulate.workload import Arrival

    for long_tokens in (0, 1_048_576):
        for running in (1, 64, 256):
            config = SchedulerConfig(max_step_ms=1e6, max_chunk_tokens=1 << 21, max_running_requests=512)
            simulation = Simulation(HARDWARE["8b-8xh200"](), config)
            prompts = [1024] * (running - bool(long_tokens)) + [long_tokens] * bool(long_tokens)
            for number, tokens in enumerate(prompts, 1):
                simulation.add(Arrival(at=0.0, number=number, kind="short", prompt_tokens=tokens, output_tokens=2000,
                                       token_ids=array("I", [number]) * tokens))
            scheduler, encoder = simulation.scheduler, msgspec.msgpack.Encoder()
            for _ in range(5):
                simulation.step()
            readings = []
            for _ in range(400):
                started = time.perf_counter()
                plan = scheduler.schedule()
                encoder.encode(plan)
                spent = time.perf_counter() - started
                output = ModelOutput(plan.step, [SampledTokens(rows.handle, [1], []) for rows in plan.rows], [])
                simulation.now += 0.02
                started = time.perf_counter()
                scheduler.update(plan, output)
                readings.append((spent + time.perf_counter() - started) * 1e6)
            assert len(plan.rows) == running
            console.print(f"{running:4} decoding requests{', one of 1,048,576 tokens' if long_tokens else '':28} "
                          f"median {quantile(readings, .5):7.0f} us, p99 {quantile(readings, .99):7.0f} us a step "
                          f"(wanted: at most {500 + 5 * running} us)", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=524_288, help="of the long prompts")
    parser.add_argument("--shorts", type=int, default=100, help="short requests beside the long ones")
    parser.add_argument("--idle-shorts", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="short requests a second")
    parser.add_argument("--max-step-ms", type=float, default=100.0)
    parser.add_argument("--ring-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bookkeeping", action="store_true")
    args = parser.parse_args()
    console = Console(width=160)
    if args.bookkeeping:
        bookkeeping(console)
        return
    flags = ["--ring-size", str(args.ring_size), "--max-step-ms", str(args.max_step_ms), "--kv-cache-gib", "6"]
    with running_server(console, flags) as (url, _):
        asyncio.run(measure(console, url, args))


if __name__ == "__main__":
    main()
