"""The bounds of exactness can fail: each classic mistake of a ring, made on purpose, exceeds them in every family."""

import math
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from ringserve_kernels import (
    AttentionPlan,
    AttentionSpec,
    KeyBlocks,
    KeyValues,
    attend,
    merge_attention_states,
    merge_sink,
    plan_ring,
)
from torch import Tensor

from ringserve.config import AttentionName, ModelConfig, RingMode
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.tables import RequestTable
from ringserve.selftest import Oracle, make_oracle
from ringserve.teacher import Teacher
from tests.families import FAMILIES, VOCABULARY, WINDOWED, WITH_SINKS
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.thread_ranks import thread_engine

Patch = pytest.MonkeyPatch
MODES: list[RingMode] = ["pass-kv", "pass-q"]
STEPS = 4


def base_2_lse(patch: Patch) -> None:
    def mutant(q: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec,
               into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        o, lse = attend(q, keys, plan, spec)
        lse.div_(math.log(2))
        if into is None:
            return o, lse
        merge_attention_states(*into, o, lse)
        return into

    patch.setattr(import_module("ringserve_kernels.ring_attention"), "attend", mutant)


def _change_keys(patch: Patch, change: Callable[[KeyBlocks], KeyBlocks]) -> None:
    original = RequestTable.keys
    patch.setattr(RequestTable, "keys", lambda *args: change(original(*args)))


def block_dropped(patch: Patch) -> None:
    def drop(keys: KeyBlocks) -> KeyBlocks:
        # The block before the last: inside every window, and never the row's own.
        keep = np.arange(len(keys)) != len(keys) - 2
        return keys.take(keep)

    _change_keys(patch, drop)


def block_counted_twice(patch: Patch) -> None:
    def repeat(keys: KeyBlocks) -> KeyBlocks:
        order = np.sort(np.append(np.arange(len(keys)), len(keys) - 2)) if len(keys) > 1 else np.arange(len(keys))
        return KeyBlocks(keys.first[order], keys.length[order], keys.offset[order])

    _change_keys(patch, repeat)


def window_off_by_one(patch: Patch) -> None:
    def mutant(rank: int, size: int, sequences: object, window: int | None, *rest: object) -> object:
        return plan_ring(rank, size, sequences, None if window is None else window + 1, *rest)  # type: ignore[arg-type]

    patch.setattr(import_module("ringserve.model.runner"), "plan_ring", mutant)


def sink_counted_twice(patch: Patch) -> None:
    def mutant(o: Tensor, lse: Tensor, sink: Tensor) -> None:
        merge_sink(o, lse, sink)
        merge_sink(o, lse, sink)

    patch.setattr(import_module("ringserve_kernels.ring_attention"), "merge_sink", mutant)


MUTANTS: list[tuple[Callable[[Patch], None], list[str]]] = [
    (base_2_lse, FAMILIES), (block_dropped, FAMILIES), (block_counted_twice, FAMILIES),
    (window_off_by_one, WINDOWED), (sink_counted_twice, WITH_SINKS)]
CASES = [(mutant, family) for mutant, families in MUTANTS for family in families]


def make_text() -> list[int]:
    rng = random.Random(0)
    return [rng.randrange(VOCABULARY) for _ in range(120)]


def oracle_of(path: Path) -> Oracle:
    return make_oracle(lambda: read_checkpoint(ModelConfig(model=str(path))), "cpu", [make_text()])


@pytest.fixture(scope="module")
def oracles(family_directory: FamilyDirectory) -> dict[str, Oracle]:
    return {family: oracle_of(family_directory(family)) for family in FAMILIES}


@pytest.mark.parametrize("attention", ["auto", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mistake_the_bounds_hold(family: str, attention: AttentionName, oracles: dict[str, Oracle],
                                           family_directory: FamilyDirectory) -> None:
    for mode in MODES:
        engine = thread_engine(family_directory(family), 2, mode, attention=attention)
        outcome = oracles[family].compare(mode, Teacher(engine).run([make_text()], [120 - STEPS]))
        assert outcome.passed, outcome


@pytest.mark.parametrize("mutant, family", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_a_mistake_exceeds_the_bounds(mutant: Callable[[Patch], None], family: str, oracles: dict[str, Oracle],
                                      family_directory: FamilyDirectory, monkeypatch: Patch) -> None:
    engine = thread_engine(family_directory(family), 2, "pass-kv")
    mutant(monkeypatch)
    outcome = oracles[family].compare(mutant.__name__, Teacher(engine).run([make_text()], [120 - STEPS]))
    assert outcome.error > 10 * outcome.bound, outcome
