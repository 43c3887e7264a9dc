"""`ringserve selftest`: the table and the exit code."""

from rich.console import Console
from rich.table import Table

from ringserve.config import EngineConfig
from ringserve.selftest import Outcome, run_selftest


def report_selftest(config: EngineConfig) -> int:
    """0 when every run is within its bound, 1 otherwise."""
    console = Console()
    table = Table("run", "relative RMS of logits", "bound", "greedy tokens equal", "")
    passed = True
    for outcome in run_selftest(config, lambda line: console.print(line, style="dim", highlight=False)):
        passed &= outcome.passed
        table.add_row(*_row(outcome))
    console.print(table)
    console.print("passed: the ring computes what transformers computes" if passed else
                  "FAILED: this set-up gives wrong numbers; do not serve with it", style=None if passed else "bold red")
    return 0 if passed else 1


def _row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    return (outcome.name, f"{outcome.error:.2e}", f"{outcome.bound:.2e}", f"{outcome.equal} of {outcome.tokens}",
            "ok" if outcome.passed else "[bold red]FAILED[/]")
