"""Keys and values in eight bits: as close to transformers over the same codes as without, and that is said honestly."""

import random

import pytest
import torch
from ringserve_kernels.quantize import dequantize, quantize

from ringserve.config import AttentionName, KVCacheDtype, ModelConfig, RingMode
from ringserve.model.checkpoint import read_checkpoint
from ringserve.selftest import Oracle, make_oracle
from ringserve.teacher import Teacher
from tests.families import VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.thread_ranks import thread_engine

LOSS = {"int8": (0.003, 0.02), "fp8": (0.01, 0.08)}
"""Least and most relative RMS that a format may cost one tensor of Gaussian numbers."""


@pytest.mark.parametrize("name, dtype", [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_what_a_format_costs(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 500, 64, generator=torch.Generator().manual_seed(0))
    error = float((dequantize(*quantize(x, dtype), torch.float32) - x).norm() / x.norm())
    least, most = LOSS[name]
    assert least < error < most


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    codes, scale = quantize(torch.tensor([[[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]]]), dtype)
    back = dequantize(codes, scale, torch.float32)[0]
    assert torch.equal(back[0], torch.zeros(2))
    assert not scale[0, 1:].isfinite().any()


def text() -> list[int]:
    rng = random.Random(0)
    return [rng.randrange(VOCABULARY) for _ in range(100)]


@pytest.fixture(scope="module", params=["int8", "fp8"])
def oracle(request: pytest.FixtureRequest, family_directory: FamilyDirectory) -> tuple[KVCacheDtype, Oracle]:
    path = family_directory("qwen3")
    return request.param, make_oracle(lambda: read_checkpoint(ModelConfig(model=str(path))), "cpu", [text()],
                                      stored=request.param)


@pytest.mark.parametrize("attention", ["auto", "torch"])
@pytest.mark.parametrize("mode", ["pass-kv", "pass-q"])
def test_a_ring_gives_what_transformers_gives_over_the_same_codes(
        oracle: tuple[KVCacheDtype, Oracle], mode: RingMode, attention: AttentionName,
        family_directory: FamilyDirectory) -> None:
    stored, expected = oracle
    engine = thread_engine(family_directory("qwen3"), 2, mode, attention=attention, kv_cache_dtype=stored)
    outcome = expected.compare(mode, Teacher(engine).run([text()], [96]))
    assert outcome.passed, outcome
    assert outcome.error < expected.format_loss / 10, "the ring adds next to nothing to what the format costs"
    assert expected.format_loss > 1e-3
