"""Keys from the cache are as good as new ones: logits on real rings, against transformers' own eager attention."""

import random

import pytest

from ringserve.config import ModelConfig
from ringserve.engine import LLMEngine
from ringserve.model.checkpoint import read_checkpoint
from ringserve.selftest import make_oracle
from ringserve.teacher import Logits, Teacher
from tests.families import VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.rings import BLOCK, Rings

FAMILIES = ["gemma3", "gpt-oss"]
DECODE = 6


def text(length: int, seed: int, begin: list[int] | None = None) -> list[int]:
    rng = random.Random(seed)
    part = [rng.randrange(VOCABULARY) for _ in range(max(3, length // 3))]
    return ((begin or []) + part * 4)[:length]


def check(engine: LLMEngine, path: object, texts: list[list[int]], prompts: list[int]) -> list[Logits]:
    """Run the texts, and compare the logits of whatever was computed."""
    runs = Teacher(engine).run(texts, prompts)
    engine.scheduler.check()
    for run, whole in zip(runs, texts):
        oracle = make_oracle(lambda: read_checkpoint(ModelConfig(model=str(path))), "cpu", [whole], sorted(run))
        outcome = oracle.compare("cached", [run])
        assert outcome.passed, outcome
    return runs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ring_size", [1, 2, 3])
def test_what_follows_a_cached_prefix(family: str, ring_size: int, rings: Rings,
                                      family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    engine = rings.engine(path, ring_size)
    first = text(200 + DECODE, 1)
    check(engine, path, [first], [200])
    # The next turn of the conversation, and another question about its first 150 tokens.
    turn = text(260 + DECODE, 2, first)
    question = text(180 + DECODE, 3, first[:150])
    runs = check(engine, path, [turn, question], [260, 180])
    assert min(runs[0]) == 200 // BLOCK * BLOCK, "blocks that filled up with output are found too"
    assert min(runs[1]) == 150 // BLOCK * BLOCK


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ring_size", [2, 3])
def test_equal_prompts_in_flight(family: str, ring_size: int, rings: Rings, family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    engine = rings.engine(path, ring_size)
    one = text(150 + DECODE, 4)
    longer = text(190 + DECODE, 5, one[:150])
    runs = check(engine, path, [one, one, longer], [150, 150, 190])
    computed = [sum(p < prompt for p in run) for run, prompt in zip(runs, (150, 150, 190))]
    shared = 149 // BLOCK * BLOCK
    assert computed == [150, 150 - shared, 190 - 150 // BLOCK * BLOCK]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ring_size", [2, 3])
def test_a_hole_is_filled_against_the_keys_around_it(family: str, ring_size: int, rings: Rings,
                                                     family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    engine = rings.engine(path, ring_size)
    one = text(300 + DECODE, 6)
    check(engine, path, [one], [300])
    cache = engine.scheduler.cache
    for rank in range(ring_size):  # evict the cheapest block of each rank: an early one
        cache._make_room(rank, engine.pool.free_on(rank) + 1)
    cache.check()
    [run] = check(engine, path, [one], [300])
    holes = [p for p in run if p < 299 // BLOCK * BLOCK]
    assert len(holes) == ring_size * BLOCK and max(holes) < 10 * BLOCK


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_requests_share_and_copy(width: int, rings: Rings, family_directory: FamilyDirectory) -> None:
    """Many requests over one prefix on a ring of three, each on one or two ranks: copies are made, nothing changes."""
    path = family_directory("gemma3")
    engine = rings.engine(path, 3)
    engine.scheduler._placer._width = width
    prefix = text(100, 7)
    Teacher(engine).run([text(100 + DECODE, 8, prefix)], [100])
    texts = [text(130 + 5 * i + DECODE, 9 + i, prefix) for i in range(7)]
    teacher = Teacher(engine, everywhere=False)
    runs = teacher.run(texts, [130 + 5 * i for i in range(7)])
    for run, whole in zip(runs, texts):
        oracle = make_oracle(lambda: read_checkpoint(ModelConfig(model=str(path))), "cpu", [whole], sorted(run))
        outcome = oracle.compare("narrow", [run])
        assert outcome.passed, outcome
    assert min(min(run) for run in runs) == 100 // BLOCK * BLOCK
    if width == 1:
        assert any(plan.copies for plan in teacher.plans), "all on one rank: the prefix was never copied"
