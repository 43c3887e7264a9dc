"""Every family through our attention function gives what transformers' eager attention and masks give."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import ringserve.model.layers as layers_module
from ringserve.config import ModelConfig
from ringserve.errors import UnsupportedModelError
from ringserve.model.checkpoint import Checkpoint, read_checkpoint
from ringserve.model.checks import (
    PlainAttention,
    check_against_eager,
    check_no_other_mixing,
    check_positions,
)
from ringserve.model.layers import AttentionLayer, forward, record_layers
from ringserve.model.masks import check_masks
from ringserve.model.probe import probe
from ringserve.model.rope import fix_frequencies
from ringserve.model.weights import load_model
from tests.families import FAMILIES, VOCABULARY, WINDOW, WINDOWED, WITH_SINKS, load_eager, reference_logits
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.model.conftest import WriteCheckpoint

TOKENS = 150  # over several windows, and beyond the short set of the longrope family


def read(path: Path) -> Checkpoint:
    return read_checkpoint(ModelConfig(model=str(path)))


@cache
def load(path: Path) -> tuple[Any, list[AttentionLayer]]:
    checkpoint = read(path)
    model = load_model(checkpoint)
    fix_frequencies(model, checkpoint.max_model_len)
    return model, record_layers(model)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return float(difference / expected.double().pow(2).mean().sqrt())


def make_ids() -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_any_order_of_the_tokens(family: str, family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    model, layers = load(path)
    ids = make_ids()
    expected = reference_logits(load_eager(path), ids.tolist())
    rows = torch.arange(TOKENS)
    assert relative_rms(forward(model, ids, rows, rows, PlainAttention(layers, rows)), expected) < 1e-5
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    shuffled = forward(model, ids[order], order, rows, PlainAttention(layers, order))
    assert relative_rms(shuffled, expected[order]) < 1e-5
    some = torch.tensor([0, 7, TOKENS - 1])
    assert torch.equal(forward(model, ids[order], order, some, PlainAttention(layers, order)).argmax(-1),
                       shuffled[some].argmax(-1))
    assert forward(model, ids, rows, some[:0], PlainAttention(layers, rows)).shape == (0, VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_checks(family: str, family_directory: FamilyDirectory) -> None:
    model, layers = load(family_directory(family))
    check_masks(model, layers)
    check_no_other_mixing(model)
    check_positions(model)
    check_against_eager(model, layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_specs_say_what_the_configuration_says(family: str, family_directory: FamilyDirectory) -> None:
    model, layers = load(family_directory(family))
    config = model.config
    assert [layer.name for layer in layers] == [f"model.layers.{i}.self_attn" for i in range(len(layers))]
    assert len(layers) == config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or (
        ["sliding_attention" if family in WINDOWED else "full_attention"] * len(layers))
    for layer, kind in zip(layers, kinds, strict=True):
        assert layer.spec.window == (WINDOW if kind == "sliding_attention" and family in WINDOWED else None)
        assert layer.spec.has_sink == (layer.sinks is not None) == (family in WITH_SINKS)
        assert (layer.spec.num_heads, layer.spec.num_kv_heads) == (4, 2)
        assert layer.spec.scale == pytest.approx(layer.spec.key_dim ** -0.5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_wrong_window_or_scale_shows(family: str, family_directory: FamilyDirectory) -> None:
    path = family_directory(family)
    model, layers = load(path)
    expected = reference_logits(load_eager(path), make_ids().tolist())
    rows = torch.arange(TOKENS)
    first = layers[0].spec
    window = (first.window or TOKENS) - 1
    for spec in (replace(first, window=window), replace(first, scale=first.scale * 1.01)):
        step = PlainAttention([replace(layers[0], spec=spec), *layers[1:]], rows)
        assert relative_rms(forward(model, make_ids(), rows, rows, step), expected) > 1e-4


SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": None}


def refusal(path: Path) -> str:
    """Why the model is refused."""
    with pytest.raises(UnsupportedModelError) as caught:
        model = load_model(read(path))
        layers = record_layers(model)
        check_no_other_mixing(model)
        check_positions(model)
        check_masks(model, layers)
        check_against_eager(model, layers)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_recurrent_models_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(transformers.MambaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4, max_position_embeddings=64))
    assert "recurrent state" in refusal(path)


def test_hybrid_models_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(transformers.Lfm2Config(**SMALL, max_position_embeddings=64, conv_L_cache=3,
                                                    layer_types=["full_attention", "conv"]))
    assert "layer 1" in refusal(path) and "convolution" in refusal(path)


def test_models_with_their_own_attention_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(transformers.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert "attention of its own" in refusal(path)


class Mixing(torch.nn.Module):
    """Rows exchange something outside attention."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return self.inner(x + 0.01 * shifted)  # type: ignore[no-any-return]


def test_a_convolution_behind_the_interface_is_found(family_directory: FamilyDirectory) -> None:
    model = load_model(read(family_directory("llama")))
    check_no_other_mixing(model)
    block: Any = model.get_submodule("model.layers.2")
    block.mlp = Mixing(block.mlp)
    with pytest.raises(UnsupportedModelError, match="mixes tokens outside attention"):
        check_no_other_mixing(model)


def test_positions_taken_from_the_rows_are_found(family_directory: FamilyDirectory,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(read(family_directory("llama")))
    rotary: Any = model.get_submodule("model.rotary_emb")
    inner = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: inner(x, torch.arange(x.shape[1])[None]))
    with pytest.raises(UnsupportedModelError, match="order of the tokens"):
        check_positions(model)


@pytest.mark.parametrize("options, reason", [
    ({"position_bias": torch.zeros(1)}, "'position_bias'"),
    ({"is_causal": False}, "not causal"),
    ({"dropout": 0.1}, "training mode"),
    ({"scaling": torch.zeros(2)}, "not as one number"),
    ({"s_aux": torch.zeros(3)}, "one logit per head"),
])
def test_options_that_no_spec_can_say_are_refused(options: dict[str, Any], reason: str,
                                                  family_directory: FamilyDirectory,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(model: torch.nn.Module, ids: Sequence[int], positions: Sequence[int]) -> list[Any]:
        calls = probe(model, ids, positions)
        calls[1].options.update(options)
        return calls

    monkeypatch.setattr(layers_module, "probe", changed)
    with pytest.raises(UnsupportedModelError, match=reason):
        record_layers(load_model(read(family_directory("llama"))))
