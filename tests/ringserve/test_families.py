"""Every family on real rings: teacher-forced logits against transformers' own eager attention and masks."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ringserve.config import ModelConfig, RingMode
from ringserve.model.checkpoint import read_checkpoint
from ringserve.selftest import Oracle, make_oracle
from ringserve.teacher import Teacher
from tests.families import FAMILIES, VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.rings import BLOCK, CHUNK, Rings

DECODE_STEPS = {1: 16, 2: 64, 3: 16, 4: 8}
"""By ring size: 64 in the ring of two, fewer where ranks outnumber the cores of a small machine."""
MOST_STEPS = max(DECODE_STEPS.values())


def make_texts(ring_size: int = 2) -> tuple[list[list[int]], list[int]]:
    """Texts and their prompts' lengths: over several chunks and every window; shorter than the ring; one token."""
    rng = random.Random(0)
    prompts = [203, 2, 1, 37]
    texts = [([rng.randrange(VOCABULARY) for _ in range(max(3, p // 3))] * 40)[:p + MOST_STEPS] for p in prompts]
    return [text[:p + DECODE_STEPS[ring_size]] for text, p in zip(texts, prompts)], prompts


@cache
def longest_oracle(path: Path) -> Oracle:
    return make_oracle(lambda: read_checkpoint(ModelConfig(model=str(path))), "cpu", make_texts()[0])


def oracle_of(path: Path, texts: list[list[int]]) -> Oracle:
    """For texts that are beginnings of the longest ones."""
    whole = longest_oracle(path)
    return replace(whole, logits=[logits[:len(text)] for logits, text in zip(whole.logits, texts)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
def test_logits_are_those_of_transformers(family: str, ring_size: int, rings: Rings,
                                          family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    texts, prompts = make_texts(ring_size)
    oracle = oracle_of(path, texts)
    engine = rings.engine(path, ring_size, mode="pass-kv")
    modes: list[RingMode] = ["pass-kv", "pass-q"] if ring_size > 1 else ["pass-kv"]
    for mode in modes:
        if mode != engine.config.ring.ring_mode:
            engine = rings.remode(engine, mode)
        outcome = oracle.compare(f"{family} ring {ring_size} {mode}", Teacher(engine).run(texts, prompts))
        engine.scheduler.check()
        assert outcome.tokens > 100, "the oracle is certain of too few tokens to compare"
        assert outcome.passed, outcome


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@pytest.mark.parametrize("ring_size", [2, 3, 4])
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q"])
def test_gloo_gives_the_same(family: str, ring_size: int, mode: RingMode, rings: Rings,
                             family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    texts, prompts = make_texts(4)
    engine = rings.engine(path, ring_size, mode=mode, transport="gloo")
    assert oracle_of(path, texts).compare(family, Teacher(engine).run(texts, prompts)).passed


@pytest.mark.parametrize("family", ["gemma3"])
def test_16_bits_are_no_worse_than_transformers(family: str, rings: Rings, tmp_path: Path) -> None:
    from tests.families import write_family

    write_family(family, tmp_path, torch.bfloat16)
    texts, prompts = make_texts()
    outcome = oracle_of(tmp_path, texts).compare(family, Teacher(rings.engine(tmp_path, 2)).run(texts, prompts))
    assert outcome.error <= outcome.bound, outcome


def test_switching_the_mode_at_a_chunk_edge_changes_nothing(rings: Rings, family_directory: FamilyDirectory) -> None:
    path = family_directory("gemma3")
    texts, prompts = make_texts()
    engine = rings.engine(path, 3)
    flips = iter(range(10**6))
    # The plan says what travels, chunk by chunk and group by group: any choice must give the same numbers.
    engine.scheduler.cost.modes = lambda new, cached, width=None: [  # type: ignore[method-assign]
        "pass-kv" if new > 1 and next(flips) % 2 else "pass-q" for _ in engine.executor.groups]
    teacher = Teacher(engine)
    outcome = oracle_of(path, texts).compare("alternating", teacher.run(texts, prompts))
    assert outcome.passed, outcome
    assert {mode for plan in teacher.plans for rows in plan.rows for mode in rows.modes} == {"pass-kv", "pass-q"}


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q"])
@pytest.mark.parametrize("ring_size", [2, 3])
def test_the_bytes_sent_are_what_the_formula_says(ring_size: int, mode: RingMode, transport: str, rings: Rings,
                                                  family_directory: FamilyDirectory) -> None:
    """Llama: every layer sees everything. A ring that gathers everything, or never sends, fails here."""
    engine = rings.engine(family_directory("llama"), ring_size, mode=mode, transport=transport)
    group, element = engine.executor.groups[0], 4
    length = CHUNK * 3
    teacher = Teacher(engine)
    teacher.run([list(range(length))], [length])
    for plan, output in zip(teacher.plans[:3], teacher.outputs):
        [(start, stop)] = plan.rows[0].spans
        sent = np.array([rank.bytes_sent for rank in output.ranks])
        assert np.all(np.diag(sent) == 0)
        if mode == "pass-q":
            row = group.num_heads * (group.key_dim * element + group.value_dim * 4 + 4)
            # In every pair some row comes after some key, so all rows go everywhere.
            assert sent.sum() == (stop - start) * (ring_size - 1) * row * len(group.layers)
        else:
            key = group.num_kv_heads * (group.key_dim + group.value_dim) * element
            # Less the blocks that begin after the last row of the rank they would go to.
            last_block = [(stop // BLOCK - 1 - rank) // ring_size * ring_size + rank for rank in range(ring_size)]
            seen = sum(BLOCK for block in range(stop // BLOCK) for to in range(ring_size)
                       if to != block % ring_size and block < last_block[to])
            assert sent.sum() == seen * key * len(group.layers)

