"""Frequencies do not depend on a call, and angles are right at ten million positions."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ringserve.config import ModelConfig
from ringserve.errors import UnsupportedModelError
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.checks import PlainAttention
from ringserve.model.layers import forward, record_layers
from ringserve.model.rope import EXACT_BELOW, fix_frequencies
from ringserve.model.weights import load_model
from tests.families import CONFIGS, FAMILIES, MAX_POSITIONS, VOCABULARY, reference_logits
from tests.ringserve.conftest import FamilyDirectory

TEN_MILLION = 10_000_000


def open_rotary(family: str, max_model_len: int) -> Any:
    """The rotary module of a family's model, alone as transformers makes it."""
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    fix_frequencies(model, max_model_len)
    return model.model.rotary_emb


def layer_types(rotary: Any) -> list[list[str]]:
    return [[layer_type] for layer_type in rotary.rope_type] if isinstance(rotary.rope_type, dict) else [[]]


def ask(rotary: Any, positions: list[int], *layer_type: str, dtype: torch.dtype = torch.float32,
        ) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(torch.zeros(1, len(positions), 4, dtype=dtype), torch.tensor([positions]), *layer_type)
    return cos[0], sin[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_far_angles_are_those_of_fp64(family: str) -> None:
    rotary = open_rotary(family, TEN_MILLION + 1)
    far = [EXACT_BELOW, EXACT_BELOW + 1, 3_000_001, 9_999_999, TEN_MILLION]
    for kind in layer_types(rotary):
        prefix = "".join(f"{name}_" for name in kind)
        frequencies = getattr(rotary, f"{prefix}inv_freq").tolist()
        scaling = getattr(rotary, f"{prefix}attention_scaling")
        cos, sin = ask(rotary, far, *kind)
        for row, position in enumerate(far):
            # Python's floats are the oracle: the frequency as stored, the product and the cosine in fp64.
            expected = torch.tensor([math.cos(position * f) * scaling for f in frequencies])
            assert torch.allclose(cos[row, :len(frequencies)], expected, atol=1e-6)
            expected = torch.tensor([math.sin(position * f) * scaling for f in frequencies])
            assert torch.allclose(sin[row, -len(frequencies):], expected, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_rows_keep_the_numbers_of_transformers(family: str, dtype: torch.dtype) -> None:
    mine = open_rotary(family, TEN_MILLION)
    theirs = open_rotary(family, EXACT_BELOW)
    for kind in layer_types(mine):
        near = [EXACT_BELOW - 1, 0, 777, 131_072]
        actual = ask(mine, [TEN_MILLION - 1, *near], *kind, dtype=dtype)
        for a, b in zip(actual, ask(theirs, near, *kind, dtype=dtype)):
            assert torch.equal(a[1:], b)
            assert a.dtype == b.dtype


def test_fp32_alone_would_be_wrong_there() -> None:
    cos, _ = ask(open_rotary("llama", EXACT_BELOW), [9_999_999])
    right, _ = ask(open_rotary("llama", TEN_MILLION), [9_999_999])
    assert (cos - right).abs().max() > 0.01


def test_interleaved_angles() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.CohereConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=None))
    fix_frequencies(model, TEN_MILLION)
    cos, _ = ask(model.model.rotary_emb, [TEN_MILLION - 1])
    expected = [math.cos((TEN_MILLION - 1) * f) for f in model.model.rotary_emb.inv_freq.tolist()]
    assert torch.allclose(cos[0, ::2], torch.tensor(expected), atol=1e-6)
    assert torch.equal(cos[0, ::2], cos[0, 1::2])


def test_an_unknown_layout_is_refused_only_where_it_matters() -> None:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    rotary = model.model.rotary_emb
    inner = rotary.forward
    rotary.forward = lambda x, position_ids: tuple(part.flip(-1) for part in inner(x, position_ids))
    fix_frequencies(model, EXACT_BELOW)
    with pytest.raises(UnsupportedModelError, match="max_model_len"):
        fix_frequencies(model, EXACT_BELOW + 1)


@pytest.mark.parametrize("max_model_len, used", [
    (128, "short_factor"), (129, "long_factor"), (2048, "long_factor")])
def test_longrope_uses_one_set_for_every_call(max_model_len: int, used: str) -> None:
    rotary = open_rotary("phi3-longrope", max_model_len)
    factors = torch.tensor(rotary.config.rope_parameters[used])
    dims = torch.arange(0, 16, 2) / 16
    expected = 1.0 / (factors * 10000.0**dims)
    together = ask(rotary, [5, 1000])[0]
    alone = ask(rotary, [5])[0]
    assert torch.equal(together[0], alone[0])
    assert torch.allclose(rotary.inv_freq, expected)
    assert torch.allclose(alone[0, :8], (5 * expected).cos() * rotary.attention_scaling, atol=1e-6)


@pytest.mark.parametrize("max_model_len, tokens", [(128, 100), (MAX_POSITIONS, 150)])
def test_longrope_equals_transformers_on_each_side(max_model_len: int, tokens: int,
                                                   family_directory: FamilyDirectory) -> None:
    path = family_directory("phi3-longrope")
    checkpoint = read_checkpoint(ModelConfig(model=str(path), max_model_len=max_model_len))
    model = load_model(checkpoint)
    fix_frequencies(model, max_model_len)
    layers = record_layers(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
    expected = reference_logits(plain.eval(), ids.tolist())  # transformers chooses by the length of this call
    # A call of 40 tokens would make transformers choose the short set: here it is the server's length that counts.
    for n in (tokens, 40):
        rows = torch.arange(n)
        actual = forward(model, ids[:n], rows, rows, PlainAttention(layers, rows))
        assert float((actual - expected[:n]).norm() / expected[:n].norm()) < 1e-5


def test_dynamic_frequencies_are_refused() -> None:
    config = CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        fix_frequencies(transformers.AutoModelForCausalLM.from_config(config), 64)


def test_scaling_asked_for_reaches_the_model(family_directory: FamilyDirectory) -> None:
    path = str(family_directory("llama"))
    scaling = '{"rope_type": "linear", "factor": 4.0}'
    plain = load_model(read_checkpoint(ModelConfig(model=path)))
    scaled = load_model(read_checkpoint(
        ModelConfig(model=path, rope_scaling=scaling, max_model_len=4 * MAX_POSITIONS)))
    frequencies = [model.get_buffer("model.rotary_emb.inv_freq") for model in (plain, scaled)]
    assert torch.allclose(frequencies[0], 4 * frequencies[1])
