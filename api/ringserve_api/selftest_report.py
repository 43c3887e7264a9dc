"""`ringserve selftest`: a row per run as it ends, and the exit code."""

from rich.console import Console

from ringserve.config import EngineConfig
from ringserve.selftest import Outcome, run_selftest

_ROW = "{:22} {:>24} {:>10} {:>21}  {}"
_HEAD = _ROW.format("run", "relative RMS of logits", "bound", "greedy tokens equal", "")


def report_selftest(config: EngineConfig) -> int:
    """0 when every run is within its bound, 1 otherwise."""
    console = Console(highlight=False, soft_wrap=True)
    passed = True
    for number, outcome in enumerate(run_selftest(config, lambda line: console.print(line, style="dim"))):
        if number == 0:
            console.print(_HEAD, style="bold")
        passed &= outcome.passed
        console.print(_row(outcome), style=None if outcome.passed else "bold red")
    console.print("passed: the ring computes what transformers computes" if passed else
                  "FAILED: this set-up gives wrong numbers; do not serve with it", style=None if passed else "bold red")
    return 0 if passed else 1


def _row(outcome: Outcome) -> str:
    return _ROW.format(outcome.name, f"{outcome.error:.2e}", f"{outcome.bound:.2e}",
                       f"{outcome.equal} of {outcome.tokens}", "ok" if outcome.passed else "FAILED")
