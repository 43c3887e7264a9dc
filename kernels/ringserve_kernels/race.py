"""Races between layouts on this machine (a second on a CPU), run once per machine, shape and library.

The result is kept in `races.json` of the user's cache directory; a file that cannot be read or written costs a race.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ringserve_kernels.case import Case
from ringserve_kernels.layout import Layout
from ringserve_kernels.native.build import cache_directory
from ringserve_kernels.native.variants import cpu_model
from ringserve_kernels.spec import AttentionSpec

ROUNDS = 5


def race(contenders: Mapping[str, Layout], spec: AttentionSpec, dtype: torch.dtype, block: int, device: torch.device,
         shapes: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """Seconds of each contender for each of these (rows, keys), the best of some rounds. The contenders' names tell
    their versions."""
    key = "|".join(map(str, (_machine(device), torch.__version__, torch.get_num_threads(), dtype, block, spec, shapes,
                             *contenders)))
    path = cache_directory() / "races.json"
    known = _remembered(path)
    found = known.get(key, {})
    if found.keys() != contenders.keys() or any(len(best) != len(shapes) for best in found.values()):
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for rows, keys in shapes:
            # The widest view of the layer's shape: a window would make all of them fast.
            case = Case(replace(spec, window=None), dtype, rows, keys, block, device)
            for name, best in _best(case, contenders).items():
                times[name].append(best)
        known[key] = times
        _remember(path, known)
    return known[key]


def _best(case: Case, contenders: Mapping[str, Layout]) -> dict[str, float]:
    runs = {name: case.run(layout) for name, layout in contenders.items()}
    for run in runs.values():
        run()  # compiles, plans and allocates
    rounds = [{name: _seconds(run, case.device) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {name: min(times[name] for times in rounds) for name in runs}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _remembered(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        known = json.loads(path.read_text())
        return {key: times for key, times in known.items()
                if all(len(best) and all(math.isfinite(t) and t > 0 for t in best) for best in times.values())}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _remember(path: Path, known: dict[str, dict[str, list[float]]]) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
