"""`make demo`: a long prompt through a ring, as a user would send it, checked.

Starts a server (needle, a ring of two), hides codes in real text (the Python standard library's own sources), asks
for each over HTTP with the official openai client, and compares every answer with what the text says. Exits 1 when
one is wrong. `--tokens 1048576` does the same with a million tokens and one code.
"""

import queue
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro
from rich.console import Console
from rich.table import Table

from ringserve.async_engine import resolve_model
from ringserve.tokenizer import Tokenizer
from ringserve_api.offline import PrefillBar

DEPTHS = (0.02, 0.37, 0.71, 0.98)
MILLION = 1 << 20
ONE_NEEDLE_FROM = 500_000
"""Every question is a whole prefill, see `ask`: from here on one is enough."""
NAMES = ("Ada", "Tom", "Sam", "Paul")
CODES = ("7391502-3846120-9912473-5520918", "2840617-7719305-1284096-6637514",
         "9156043-0472861-3391570-8846229", "4408271-5950338-2207416-1163987")
"""Digits are tokens of their own: each code is the 32 tokens that are compared."""
CHECKED_TOKENS = 32
START_TIMEOUT_S = 180
REQUEST_TIMEOUT_S = 3600


@dataclass(frozen=True, kw_only=True)
class Demo:
    tokens: int = 131_072
    """Length of the prompt in tokens."""

    ring_size: int = 2
    """Ranks of the ring."""

    server_flags: tuple[str, ...] = ()
    """More flags for `ringserve serve`, for example `--server-flags --ring-mode pass-q`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    depth: float
    text: str
    expected: str
    prompt_tokens: int
    first_token_s: float
    decode_s: float
    """Per token after the first."""

    @property
    def right(self) -> bool:
        return self.text == self.expected


class Haystack:
    """Real text with a code hidden at each depth, cut so that text and question make the wanted length."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, depths: tuple[float, ...]) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens
        self._facts = [f"\nThe secret code of {name} is {code}.\n" for name, code in zip(NAMES, CODES)][:len(depths)]
        self.questions = [f"\nThe secret code of {name} is" for name in NAMES][:len(depths)]
        source = self._source(tokens)
        ids = tokenizer.encode(source, allow_special=False)
        length = min(tokens, len(ids))
        for _ in range(8):
            self.text = self._planted(tokenizer.decode(ids[:length], skip_special_tokens=False), depths)
            missing = tokens - len(tokenizer.encode(self.text + self.questions[0]))
            if missing == 0:
                break
            length += missing

    def expected(self, number: int, count: int) -> str:
        """What stands in the text behind the fact that a question repeats: `count` tokens of it."""
        question = self.questions[number]
        after = self.text[self.text.index(question) + len(question):]
        ids = self._tokenizer.encode(after[:count * 32], allow_special=False)
        return self._tokenizer.decode(ids[:count])

    def _source(self, tokens: int) -> str:
        """Enough of the standard library; of one size, so the demo is the same on every machine with this Python."""
        parts, size = [], 0
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in path.parts:
                continue
            parts.append(path.read_text(encoding="utf-8", errors="ignore"))
            size += len(parts[-1])
            if size > 6 * tokens:
                break
        return "".join(parts)

    def _planted(self, text: str, depths: tuple[float, ...]) -> str:
        for fact, depth in sorted(zip(self._facts, depths), key=lambda pair: -pair[1]):
            at = text.rfind("\n", 0, max(1, int(len(text) * depth))) + 1
            text = text[:at] + fact + text[at:]
        return text


@dataclass(frozen=True, kw_only=True)
class Started:
    url: str
    grpc_target: str
    """Empty without `--grpc-port`."""
    process: psutil.Process


@contextmanager
def running_server(console: Console, flags: list[str], model: str = "needle") -> Iterator[Started]:
    """A `ringserve serve` of our own, which ends with the block."""
    process = subprocess.Popen([sys.executable, "-m", "ringserve_api.cli", "serve", model, "--port", "0", *flags],
                               stderr=subprocess.PIPE, text=True)
    try:
        url, grpc_target = _announced(console, process)
        yield Started(url=url, grpc_target=grpc_target, process=psutil.Process(process.pid))
    finally:
        end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """Ask a server to end; insist when it does not."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _announced(console: Console, process: "subprocess.Popen[str]") -> tuple[str, str]:
    """The URL and the gRPC target that the server says it listens on. What it says before and later is printed as it
    comes."""
    ready: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stderr is not None
        grpc_target = ""
        for line in process.stderr:
            console.print(line.rstrip(), style="dim", highlight=False)
            if "listening for gRPC on " in line:
                grpc_target = line.split("listening for gRPC on ")[1].strip()
            if "listening on " in line:
                ready.put((line.split("listening on ")[1].split()[0], grpc_target))
        ready.put(None)

    threading.Thread(target=read, name="server output", daemon=True).start()
    try:
        found = ready.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        raise SystemExit(f"the server did not listen within {START_TIMEOUT_S} s") from None
    if found is None:
        raise SystemExit(f"the server ended with code {process.wait(START_TIMEOUT_S)} before it listened")
    return found


def ask(client: Any, console: Console, prompt: str, depth: float, expected: str) -> Answer:
    """One streamed completion with a progress bar. A salt of its own, because the prefill is what is shown: the text
    before the question is the last one's, and would be found in the cache."""
    started = time.monotonic()
    arrivals: list[float] = []
    text, prompt_tokens, completion_tokens = "", 0, 0
    with PrefillBar(console) as bar:
        for chunk in client.completions.create(
                model="needle", prompt=prompt, max_tokens=CHECKED_TOKENS, temperature=0, stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_progress": True, "ignore_eos": True, "cache_salt": f"depth {depth}"}):
            progress = getattr(chunk, "prompt_progress", None)
            if progress is not None:
                bar.show(processed=progress["processed"], total=progress["total"], percent=progress["percent"],
                         seconds=time.monotonic() - started, eta_ms=progress["eta_ms"])
            if chunk.choices and chunk.choices[0].text:
                arrivals.append(time.monotonic())
                text += chunk.choices[0].text
            if chunk.usage is not None:
                prompt_tokens, completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
    return Answer(depth=depth, text=text, expected=expected, prompt_tokens=prompt_tokens,
                  first_token_s=arrivals[0] - started if arrivals else float("nan"),
                  decode_s=(arrivals[-1] - arrivals[0]) / max(1, completion_tokens - 1) if arrivals else float("nan"))


def rank_memory(server: psutil.Process) -> list[int]:
    """Peak resident bytes of each rank."""
    peaks = []
    for child in server.children(recursive=True):
        if "ringserve.rank_process" in child.cmdline():
            status = Path(f"/proc/{child.pid}/status").read_text()
            peaks.append(next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")))
    return peaks


def report(console: Console, answers: list[Answer], memory: list[int]) -> None:
    table = Table("needle at", "prompt", "first token", "prefill", "decode", "answer", "")
    for a in answers:
        table.add_row(f"{a.depth:.0%}", f"{a.prompt_tokens:,} tokens", f"{a.first_token_s:.2f} s",
                      f"{a.prompt_tokens / a.first_token_s:,.0f} tok/s", f"{a.decode_s * 1000:.1f} ms/token",
                      a.text.strip(), "right" if a.right else "[bold red]WRONG[/]")
    console.print(table)
    peaks = ", ".join(f"{peak / 2**20:,.0f}" for peak in memory)
    console.print(f"peak memory of the ranks: {peaks} MiB resident, {sum(memory) / 2**30:.2f} GiB together")


def main() -> None:
    from openai import OpenAI

    demo = tyro.cli(Demo, description=__doc__)
    console = Console(width=max(Console().width, 120))
    depths = DEPTHS if demo.tokens < ONE_NEEDLE_FROM else (DEPTHS[1],)
    console.print(f"building a prompt of {demo.tokens:,} tokens from the standard library's sources")
    haystack = Haystack(Tokenizer(resolve_model("needle")), demo.tokens, depths)
    answers = []
    with running_server(console, ["--ring-size", str(demo.ring_size), *demo.server_flags]) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0)
        for number, depth in enumerate(depths):
            question = haystack.questions[number]
            console.print(f"asking for the code at {depth:.0%}: …{question.strip()!r}", highlight=False)
            answers.append(ask(client, console, haystack.text + question, depth,
                               haystack.expected(number, CHECKED_TOKENS)))
        memory = rank_memory(server.process)
    report(console, answers, memory)
    if not all(answer.right for answer in answers):
        for answer in answers:
            if not answer.right:
                console.print(f"at {answer.depth:.0%}: expected {answer.expected!r}, got {answer.text!r}")
        sys.exit(1)
    console.print(f"all {len(answers)} answers are right, each compared over {CHECKED_TOKENS} tokens")


if __name__ == "__main__":
    main()
