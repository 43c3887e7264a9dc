"""What the gRPC API costs, and what it gains: every answer checked.

    python benchmarks/grpc.py --tokens 131072

On a server of its own with an engine that only echoes: four million ids up, and the processor time of each token that
comes down. On a real one (needle, a ring of two): how soon a call is accepted, a prompt as text and as ids with the
code in it asked for, and how much of a slow upload the prefill hides.
"""

# ruff: noqa: E402 - this file must not be found when `grpc` is imported
import sys
from pathlib import Path

sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import argparse
import asyncio
import hashlib
import multiprocessing
import statistics
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import google_crc32c
import grpc
import psutil
from rich.console import Console
from ringserve_api.config import ServerConfig
from ringserve_api.demo import Haystack, running_server
from ringserve_api.rpc.server import RpcServer
from ringserve_api.server import Server

from ringserve.async_engine import resolve_model
from ringserve.outputs import RequestOutput, Usage
from ringserve.sampling_params import SamplingParams
from ringserve.tokenizer import Tokenizer
from ringserve.v1 import inference_pb2 as pb
from ringserve.v1.inference_pb2_grpc import InferenceServiceStub

CHUNK = 256 << 10
SMALL_CHUNK = 8 << 10
ANSWER_TOKENS = 12
TIMEOUT_S = 3600


class Echo:
    """An engine that costs nothing: what is left is the API."""

    dead = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.info = SimpleNamespace(
            model_name="echo", max_model_len=8 << 20, vocab_size=1 << 32, ring_size=1, version="0", prefix_cache=False,
            default_sampling={})
        self._text = [tokenizer.decode([i]) for i in range(300, 400)]

    async def submit(self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str,
                     **_: Any) -> "Stream":
        ids = array("I", prompt_token_ids)
        return Stream(self._answer(request_id, params.max_tokens or 1, len(ids), sum(ids) & 0xFFFF))

    async def _answer(self, request_id: str, tokens: int, prompt_tokens: int, checksum: int
                      ) -> AsyncIterator[RequestOutput]:
        for i in range(tokens):
            await asyncio.sleep(0)
            last = i == tokens - 1
            yield RequestOutput(
                request_id=request_id, text=self._text[i % 100], token_ids=[checksum if last else 300 + i % 100],
                finish_reason="length" if last else None,
                usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens) if last else None)

    async def cancel(self, request_id: str) -> None:
        pass

    async def close(self) -> None:
        pass

    async def died(self) -> Any:
        await asyncio.Event().wait()


class Stream:
    estimate = None

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self._outputs

    def __anext__(self) -> Any:
        return self._outputs.__anext__()


def serve_echo(told: Connection) -> None:
    async def main() -> None:
        tokenizer = Tokenizer(resolve_model("needle"))
        config = ServerConfig(port=0, grpc_port=0)
        rpc = RpcServer(config)
        rpc.bind()
        engine: Any = Echo(tokenizer)
        await Server(engine, tokenizer, config, rpc=rpc, on_ready=lambda _: told.send(rpc.target)).serve()
    asyncio.run(main())


def messages(data: bytes, opening: pb.Open, *, chunk: int = CHUNK,
             seconds: float = 0.0) -> Iterator[pb.GenerateRequest]:
    """A whole prompt; with `seconds` over a link that takes so long for it."""
    yield pb.GenerateRequest(open=opening)
    began = time.monotonic()
    for at in range(0, len(data), chunk):
        piece = data[at:at + chunk]
        time.sleep(max(0.0, began + seconds * (at + len(piece)) / len(data) - time.monotonic()))
        yield pb.GenerateRequest(chunk=pb.PromptChunk(offset=at, data=piece, crc32c=google_crc32c.value(piece)))
    yield pb.GenerateRequest(commit=pb.Commit(total_bytes=len(data), sha256=hashlib.sha256(data).digest()))


def opening(model: str, data_kind: "pb.PromptKind", tokens: int, salt: str = "") -> pb.Open:
    return pb.Open(model=model, prompt_kind=data_kind, scheduling=pb.Scheduling(cache_salt=salt),
                   sampling=pb.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))


def echo_figures(console: Console, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_echo, args=(theirs,))
    process.start()
    try:
        if not ours.poll(60):
            raise SystemExit("the server did not start")
        with grpc.insecure_channel(ours.recv()) as channel:
            stub = InferenceServiceStub(channel)
            four_million(console, stub, rounds)
            tokens_down(console, stub, psutil.Process(process.pid), rounds)
    finally:
        process.terminate()
        process.join(30)


def four_million(console: Console, stub: InferenceServiceStub, rounds: int) -> None:
    ids = array("I", range(4_000_000))
    data, checksum = ids.tobytes(), sum(ids) & 0xFFFF
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        *_, last = stub.Generate(messages(data, opening("echo", pb.PROMPT_KIND_TOKEN_IDS, 1)), timeout=60)
        taken.append(time.perf_counter() - began)
        if last.event.finished.usage.prompt_tokens != len(ids):
            raise SystemExit(f"{len(ids)} ids were sent, {last.event.finished.usage.prompt_tokens} came")
    events = list(stub.Generate(messages(data, opening("echo", pb.PROMPT_KIND_TOKEN_IDS, 1)), timeout=60))
    if not any(list(e.event.delta.token_ids) == [checksum] for e in events):
        raise SystemExit("the ids that came are not those that were sent")
    console.print(f"4,000,000 ids up, checked and answered: {statistics.median(taken):.2f} s "
                  f"(wanted: under 1 s; {rounds} rounds, longest {max(taken):.2f} s)", highlight=False)


def tokens_down(console: Console, stub: InferenceServiceStub, server: psutil.Process, rounds: int) -> None:
    count, costs, walls = 20_000, [], []
    prompt = b"\0\0\0\0"
    for _ in range(rounds):
        before, began = sum(server.cpu_times()[:2]), time.perf_counter()
        got = sum(len(e.event.delta.token_ids) for e in stub.Generate(
            messages(prompt, opening("echo", pb.PROMPT_KIND_TOKEN_IDS, count)), timeout=120))
        walls.append((time.perf_counter() - began) / count * 1e6)
        costs.append((sum(server.cpu_times()[:2]) - before) / count * 1e6)
        if got != count:
            raise SystemExit(f"{count} tokens were asked for, {got} came")
    console.print(f"tokens down, one event each: {statistics.median(costs):.0f} us of the server's processor time a "
                  f"token (wanted: under 60), {statistics.median(walls):.0f} us from one to the next", highlight=False)


@dataclass
class Seen:
    first_token_s: float = 0.0
    """From Open."""
    text: str = ""
    shares: list[tuple[float, float]] = field(default_factory=list)
    """(of the prompt's tokens, of its cost), as the prefill came along."""

    @property
    def best_overlap(self) -> float:
        """The least that can be reached over a link as slow as the prefill: what is behind a place of the prompt cannot
        begin before the place has arrived, and costs what it costs."""
        return max((arrived + 1 - done for arrived, done in self.shares), default=1.0)


def asked(stub: InferenceServiceStub, requests: Iterator[pb.GenerateRequest]) -> Seen:
    seen, began = Seen(), time.perf_counter()
    for response in stub.Generate(requests, timeout=TIMEOUT_S):
        event = response.event
        if event.HasField("delta"):
            seen.first_token_s = seen.first_token_s or time.perf_counter() - began
            seen.text += event.delta.text
        if event.HasField("prefill_progress"):
            progress = event.prefill_progress
            seen.shares.append((progress.processed_tokens / progress.total_tokens, progress.percent / 100))
    return seen


def needle_figures(console: Console, target: str, tokens: int, rounds: int) -> None:
    tokenizer = Tokenizer(resolve_model("needle"))
    console.print(f"building a text of {tokens:,} tokens")
    text = Haystack(tokenizer, tokens, (0.4,))
    prompt, expected = text.text + text.questions[0], text.expected(0, ANSWER_TOKENS)
    data = prompt.encode()
    with grpc.insecure_channel(target) as channel:
        stub = InferenceServiceStub(channel)
        accepted = []
        for number in range(50):
            began = time.perf_counter()
            events = stub.Generate(messages(b"abc", opening("needle", pb.PROMPT_KIND_TEXT, 1, f"a{number}")),
                                   timeout=60)
            next(events)
            accepted.append((time.perf_counter() - began) * 1000)
            for _ in events:
                pass
        accepted.sort()
        console.print(f"Open to Accepted, idle: p50 {accepted[25]:.1f} ms, p98 {accepted[48]:.1f} ms "
                      "(wanted: within 5)", highlight=False)

        def check(answer: str, what: str) -> None:
            if answer != expected:
                raise SystemExit(f"wrong answer to a prompt as {what}: expected {expected!r}, got {answer!r}")

        ids = tokenizer.encode(prompt)
        seen = asked(stub, messages(ids.tobytes(), opening("needle", pb.PROMPT_KIND_TOKEN_IDS, ANSWER_TOKENS, "ids")))
        check(seen.text, "ids")
        console.print(f"{len(ids):,} tokens as ids: first token after {seen.first_token_s:.1f} s", highlight=False)
        again = asked(stub, messages(data, opening("needle", pb.PROMPT_KIND_TEXT, ANSWER_TOKENS, "ids")))
        check(again.text, "text")
        console.print(f"the same as text, its blocks found in the cache: first token after {again.first_token_s:.1f} s",
                      highlight=False)
        for number in range(rounds):
            alone = asked(stub, messages(
                data, opening("needle", pb.PROMPT_KIND_TEXT, ANSWER_TOKENS, f"alone{number}")))
            check(alone.text, "text")
            both = asked(stub, messages(
                data, opening("needle", pb.PROMPT_KIND_TEXT, ANSWER_TOKENS, f"slow{number}"), chunk=SMALL_CHUNK,
                seconds=alone.first_token_s))
            check(both.text, "text over a slow link")
            share = both.first_token_s / alone.first_token_s
            console.print(
                f"{len(ids):,} tokens as text: first token after {alone.first_token_s:.1f} s; over a link that takes "
                f"as long for the text alone {both.first_token_s:.1f} s, {share:.2f} of it (wanted: at most 1.15; "
                f"possible at this length: {alone.best_overlap:.2f}; one after the other: 2)", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the prompt that a real server gets")
    parser.add_argument("--rounds", type=int, default=3, help="0: the prompt as ids and as text once, no slow link")
    args = parser.parse_args()
    console = Console(width=160)
    echo_figures(console, max(1, args.rounds))
    flags = ["--ring-size", "2", "--kv-cache-gib", "6", "--grpc-port", "0"]
    with running_server(console, flags) as server:
        needle_figures(console, server.grpc_target, args.tokens, args.rounds)


if __name__ == "__main__":
    main()
