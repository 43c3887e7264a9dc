"""Short requests beside long ones on a real server: what each of them waits, every answer checked.

    python benchmarks/mixed.py --tokens 131072 --shorts 100 --rate 1 --max-step-ms 100

One run of one server, in this order: short requests alone, a long one alone, short ones (Poisson) while long ones run
back to back, and different questions about one long text, the first cold and the rest from the prefix cache. A wrong
answer ends the benchmark; of a model directory (`--model`) whose weights mean nothing only the number of tokens can be
checked. `--peer PYTHON` then does the same with vLLM as installed beside that interpreter, and prints ratios.
`--bookkeeping` times the scheduler alone instead, without a model.
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from ringserve_api.demo import Haystack, end, running_server

from ringserve.async_engine import resolve_model
from ringserve.tokenizer import Tokenizer

SHORT_TOKENS, SHORT_OUTPUT = 256, 32
DEPTHS = (0.03, 0.17, 0.31, 0.44, 0.58, 0.71, 0.85, 0.97)
ETA_FROM_PERCENT = 10.0
START_S = 600.0
"""For vLLM, which compiles."""


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


@dataclass(frozen=True)
class Server:
    """One engine under measurement."""

    name: str
    client: Any
    model: str
    own: bool
    """Whether it is ringserve: others know no progress."""
    known: bool
    """Whether the model's answers are known."""


@dataclass(frozen=True)
class Figures:
    """Of one server, in seconds."""

    idle_p99_s: float
    beside_p50_s: float
    beside_p99_s: float
    gap_p99_s: float
    alone_s: float
    long_s: float
    """Median of the long ones beside short ones."""


async def ask(server: Server, prompt: str, expected: str, output: int, salt: str) -> Seen:
    """One streamed completion; SystemExit when the answer is wrong."""
    seen, text = Seen(), ""
    started = last = time.perf_counter()
    stream = await server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=output, temperature=0, stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "cache_salt": salt, "return_token_ids": not server.known}
        | ({"return_progress": True} if server.own else {}))
    completion_tokens = 0
    async for chunk in stream:
        now = time.perf_counter()
        progress = getattr(chunk, "prompt_progress", None)
        if progress is not None and progress["eta_ms"] is not None:
            seen.etas.append((now - started, progress["percent"], progress["eta_ms"] / 1000))
        # Tokens of a model whose weights mean nothing need not make text.
        if chunk.choices and (chunk.choices[0].text if server.known else chunk.choices[0].token_ids):
            if not seen.first_token_s:
                seen.first_token_s = now - started
            else:
                seen.gaps_s.append(now - last)
            last = now
            text += chunk.choices[0].text
        if chunk.usage is not None:
            seen.prompt_tokens, completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            if chunk.usage.prompt_tokens_details is not None:
                seen.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens or 0
    seen.end_s = time.perf_counter() - started
    if completion_tokens != output:
        raise SystemExit(f"{output} tokens were asked for, {completion_tokens} came")
    if server.known and not text.startswith(expected):
        raise SystemExit(f"wrong answer of {server.name}: expected {expected!r}, got {text!r}")
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


async def poisson(server: Server, shorts: Shorts, count: int, rate: float, seed: int) -> list[Seen]:
    """`count` short requests, sent at random moments whatever has become of the earlier ones."""
    rng = random.Random(seed)
    tasks = []
    for number in range(count):
        prompt, expected = shorts.next()
        tasks.append(asyncio.create_task(ask(server, prompt, expected, SHORT_OUTPUT, f"short-{seed}-{number}")))
        await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def say_shorts(console: Console, name: str, seen: Sequence[Seen]) -> None:
    first = [s.first_token_s * 1000 for s in seen]
    gaps = [gap * 1000 for s in seen for gap in s.gaps_s]
    console.print(f"{name}: {len(seen)} short requests, first token p50 {quantile(first, 0.5):.0f} ms, "
                  f"p99 {quantile(first, 0.99):.0f} ms; gap between tokens p50 {quantile(gaps, 0.5):.1f} ms, "
                  f"p99 {quantile(gaps, 0.99):.1f} ms, longest {max(gaps):.0f} ms", highlight=False)


async def measure(console: Console, server: Server, text: Haystack, shorts: Shorts,
                  args: argparse.Namespace) -> Figures:
    console.rule(server.name)

    async def long(number: int, salt: str) -> Seen:
        question = text.questions[number % len(text.questions)]
        return await ask(server, text.text + question, text.expected(number % len(text.questions), 12), 12, salt)

    await poisson(server, shorts, 5, 5.0, 1)  # first use of every path
    idle = await poisson(server, shorts, args.idle_shorts, args.rate * 2, 2)
    say_shorts(console, "idle", idle)
    service = statistics.median(s.end_s for s in idle)
    alone = await long(0, "alone")
    console.print(f"long alone: {alone.prompt_tokens:,} tokens, first token after {alone.first_token_s:.1f} s",
                  highlight=False)

    beside = asyncio.create_task(poisson(server, shorts, args.shorts, args.rate, 3))
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
        # When short ones end before it, they were there for their part of its time.
        beside_it = args.rate * seen.first_token_s if whole else args.shorts
        own = beside_it * service
        console.print(f"  long: {seen.first_token_s:.1f} s, {seen.first_token_s / alone.first_token_s:.2f} of alone, "
                      f"{seen.first_token_s / (alone.first_token_s + own):.2f} of alone and the short ones' own "
                      f"{own:.1f} s (wanted: at most 1.25)"
                      + ("" if whole else "; short ones ended before it"), highlight=False)
    if server.own:
        say_own(console, [*longs, *mixed, alone])
        await questions(console, long)
    return Figures(
        idle_p99_s=before / 1000, beside_p50_s=quantile([s.first_token_s for s in mixed], .5),
        beside_p99_s=beside_p99 / 1000, gap_p99_s=quantile([gap for s in mixed for gap in s.gaps_s], .99),
        alone_s=alone.first_token_s, long_s=statistics.median(s.first_token_s for s in longs))


def say_own(console: Console, requests: Sequence[Seen]) -> None:
    errors = [error for seen in requests for error in seen.eta_errors()]
    console.print(f"ETA, from {ETA_FROM_PERCENT:g}% on: median error {quantile(errors, .5):.1%}, p90 "
                  f"{quantile(errors, .9):.1%}, {len(errors)} reports (wanted: 10%, 25%)", highlight=False)


async def questions(console: Console, long: Callable[[int, str], Awaitable[Seen]]) -> None:
    """Eight about one text: its prefill is computed once."""
    cold = await long(0, "questions")
    warm = list(await asyncio.gather(*(long(number, "questions") for number in range(1, 8))))
    console.print(f"eight questions about one text: the first {cold.first_token_s:.2f} s; the others, at once, "
                  f"{quantile([w.first_token_s for w in warm], .5):.2f} s median, "
                  f"{max(w.first_token_s for w in warm):.2f} s worst = "
                  f"{max(w.first_token_s for w in warm) / cold.first_token_s:.1%} of it (wanted: under 3%); "
                  f"{min(w.cached_tokens for w in warm):,} of {warm[0].prompt_tokens:,} tokens cached", highlight=False)


def say_ratios(console: Console, own: Figures, peer: Figures) -> None:
    console.rule("vLLM over ringserve, in this run")
    for name, what in (("idle_p99_s", "first token of a short request, idle, p99"),
                       ("beside_p50_s", "first token of a short request beside a long one, p50"),
                       ("beside_p99_s", "the same, p99"), ("gap_p99_s", "gap between its tokens, p99"),
                       ("alone_s", "long prompt alone"), ("long_s", "long prompt beside short ones")):
        ours, theirs = getattr(own, name), getattr(peer, name)
        console.print(f"{what}: {theirs:.3f} s / {ours:.3f} s = {theirs / ours:.2f}", highlight=False)


@contextmanager
def running_vllm(console: Console, python: str, model: Path, name: str, most_tokens: int) -> Iterator[str]:
    """vLLM's own server on the same model directory; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.cpu_count() or 1
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "6", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
                   "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
             "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", str(most_tokens),
             "--max-num-batched-tokens", "2048", "--max-num-seqs", "64"], stdout=log, stderr=log, env=environment)
        try:
            url, started = f"http://127.0.0.1:{port}", time.monotonic()
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() - started > START_S:
                    log.seek(0)
                    raise SystemExit("vLLM did not start:\n" + log.read().decode(errors="replace")[-4000:])
                time.sleep(1)
            console.print(f"vLLM is up after {time.monotonic() - started:.0f} s", highlight=False)
            yield url
        finally:
            end(process)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


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
    parser.add_argument("--model", default="needle", help="or a model directory")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with vLLM, to measure in the same run")
    parser.add_argument("--bookkeeping", action="store_true")
    args = parser.parse_args()
    console = Console(width=160)
    if args.bookkeeping:
        bookkeeping(console)
        return
    known = args.model == "needle"
    directory = Path(resolve_model(args.model))
    tokenizer = Tokenizer(str(directory))
    shorts = Shorts(tokenizer, args.seed)
    console.print(f"building a text of {args.tokens:,} tokens")
    text = Haystack(tokenizer, args.tokens, DEPTHS)

    def run(name: str, url: str, own: bool) -> Figures:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=7200, max_retries=0)
        return asyncio.run(measure(console, Server(name, client, served, own, known), text, shorts, args))

    served = "needle" if known else directory.name
    flags = ["--ring-size", str(args.ring_size), "--max-step-ms", str(args.max_step_ms), "--kv-cache-gib", "6"]
    with running_server(console, flags, args.model) as server:
        figures = run("ringserve", server.url, own=True)
    if args.peer:
        with running_vllm(console, args.peer, directory, served, args.tokens + 4096) as url:
            say_ratios(console, figures, run("vLLM", url, own=False))


if __name__ == "__main__":
    main()
