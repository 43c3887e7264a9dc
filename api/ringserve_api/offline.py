"""`ringserve run`: one prompt, offline, with a progress bar; the answer is written as it comes."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn

from ringserve.config import EngineConfig
from ringserve.llm import LLM
from ringserve.outputs import RequestOutput
from ringserve.sampling_params import SamplingParams


class PrefillBar:
    """A bar weighted by cost, with tokens/s and the server's own estimate of what remains. Seen from the first
    `show` on: a request that is refused has none."""

    def __init__(self, console: Console) -> None:
        columns: list[str | ProgressColumn] = [
            TextColumn("prefill"), BarColumn(), TextColumn("{task.percentage:>5.1f}%"),
            TextColumn("{task.fields[note]}")]
        self._bar = Progress(*columns, console=console)
        self._task: TaskID = self._bar.add_task("prefill", total=100.0, note="")

    def __enter__(self) -> "PrefillBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def show(self, *, processed: int, total: int, percent: float, seconds: float, eta_ms: int | None) -> None:
        self._bar.start()
        rate = processed / seconds if seconds > 0 else 0.0
        eta = "" if eta_ms is None else f"  ETA {eta_ms / 1000:.1f} s"
        self._bar.update(self._task, completed=percent,
                         note=f"{processed:,} of {total:,} tokens  {rate:,.0f} tok/s{eta}")

    def stop(self) -> None:
        self._bar.stop()


def run_prompt(config: EngineConfig, text: str, params: Callable[[int], SamplingParams]) -> int:
    """Returns the exit code. The answer, and nothing else, goes to standard output.

    `params` is called with the tokens that the context has room for beyond the prompt."""
    console = Console(stderr=True)
    options: dict[str, Any] = {**asdict(config.cache), **asdict(config.ring), **asdict(config.scheduler),
                               **asdict(config.model)}
    with LLM(**options) as llm:
        for line in llm.info.decisions:
            console.print(line, style="dim", highlight=False, soft_wrap=True)
        token_ids = llm.tokenizer.encode(text)
        started = time.monotonic()
        first: list[float] = []
        with PrefillBar(console) as bar:
            def show(_: int, output: RequestOutput) -> None:
                if output.progress is not None:
                    p = output.progress
                    bar.show(processed=p.processed, total=p.total, percent=p.percent,
                             seconds=time.monotonic() - started, eta_ms=p.eta_ms)
                if output.token_ids and not first:
                    first.append(time.monotonic())
                    bar.stop()
                sys.stdout.write(output.text)
                sys.stdout.flush()

            [result] = llm.generate([{"prompt_token_ids": token_ids}],
                                    params(llm.info.max_model_len - len(token_ids)), on_progress=show)
        ended = time.monotonic()
        sys.stdout.write("\n")
        sys.stdout.flush()
        decoded = len(result.outputs[0].token_ids) - 1
        console.print(
            f"{len(token_ids):,} prompt tokens, first token after {first[0] - started:.2f} s "
            f"({len(token_ids) / (first[0] - started):,.0f} tok/s)"
            + (f"; {decoded} more at {(ended - first[0]) / decoded * 1000:.1f} ms each" if decoded > 0 else "")
            + f"; ended by {result.outputs[0].finish_reason}", style="dim", highlight=False, soft_wrap=True)
    return 0
