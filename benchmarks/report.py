"""What a figure needs beside it: machine, versions, revision. Tables for eyes, JSON for programs."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ringserve_kernels.native.variants import cpu_model, runnable


def circumstances() -> dict[str, Any]:
    """Of this run, as plain values."""
    variants = runnable()
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S %z"), "cpu": cpu_model(), "cores": os.cpu_count(),
            "instructions": variants[0].name if variants else "none of those the native kernel needs",
            "torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "revision": _revision()}


def _revision() -> str:
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10,
                              cwd=Path(__file__).parent, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def report(title: str, columns: list[str], rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print a table of these columns of the rows, and write all of the rows as JSON."""
    facts = circumstances()
    table = Table(*columns, title=f"{title}\n{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}, "
                                  f"torch {facts['torch']}, revision {facts['revision']}")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=160).print(table)
    if path is not None:
        path.write_text(json.dumps({**facts, "title": title, "rows": rows}, indent=1) + "\n")
        print(f"written to {path}")
