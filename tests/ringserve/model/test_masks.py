"""Masks that are not causal plus a window are refused, however long the pattern's period."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    sliding_window_overlay,
)

from ringserve.config import ModelConfig
from ringserve.errors import UnsupportedModelError
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.layers import AttentionLayer, record_layers
from ringserve.model.masks import _edges, _pairs, check_masks, evaluate_mask, visible
from ringserve.model.weights import load_model
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.model.conftest import WriteCheckpoint
from tests.ringserve.model.test_layers import SMALL


def open_layers(path: object) -> tuple[torch.nn.Module, list[AttentionLayer]]:
    model = load_model(read_checkpoint(ModelConfig(model=str(path))))
    return model, record_layers(model)


@pytest.mark.parametrize("chunk, max_position_embeddings", [(8192, 131072), (48, 64), (8192, 4096)])
def test_llama4_is_refused(chunk: int, max_position_embeddings: int,
                           write_checkpoint: WriteCheckpoint) -> None:
    config = transformers.Llama4TextConfig(
        **SMALL, head_dim=16, intermediate_size_mlp=32, num_local_experts=1, attention_chunk_size=chunk,
        max_position_embeddings=max_position_embeddings, no_rope_layers=[1, 0])
    model, layers = open_layers(write_checkpoint(config))
    with pytest.raises(UnsupportedModelError, match="only its mask knows"):
        check_masks(model, layers, max_position_embeddings)


def test_bidirectional_models_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    config = transformers.Gemma3TextConfig(
        **SMALL, head_dim=16, max_position_embeddings=256, sliding_window=32,
        use_bidirectional_attention=True)
    path = write_checkpoint(config)
    with pytest.raises(UnsupportedModelError, match=r"not causal|shows token"):
        check_masks(*open_layers(path))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_a_spec_that_differs_from_the_mask_is_refused(family: str, family_directory: FamilyDirectory) -> None:
    model, layers = open_layers(family_directory(family))
    check_masks(model, layers)
    windows = [layer.spec.window for layer in layers]
    for i, window in [(windows.index(window), window) for window in set(windows)]:
        for wrong in ((5, 1000, 1 << 20) if window is None else (window - 1, window + 1, None)):
            changed = list(layers)
            changed[i] = replace(layers[i], spec=replace(layers[i].spec, window=wrong))
            with pytest.raises(UnsupportedModelError, match=rf"layers\.{i}\.self_attn asks"):
                check_masks(model, changed)


def test_a_mask_of_the_models_own_making_is_refused(family_directory: FamilyDirectory) -> None:
    model, layers = open_layers(family_directory("llama"))
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **{**kwargs, "attention_mask": None})
    with pytest.raises(UnsupportedModelError, match="no mask"):
        check_masks(model, layers)


@pytest.mark.parametrize("chunk", [3, 100, 8191, 8192, 1_000_003, 5_000_000])
def test_chunks_named_nowhere_in_the_configuration_are_found(
        chunk: int, family_directory: FamilyDirectory) -> None:
    model, layers = open_layers(family_directory("llama"))
    query, key = _pairs(_edges(model.config, [layer.spec for layer in layers]), 1 << 24)
    function = and_masks(chunked_overlay(chunk, torch.zeros(1, dtype=torch.long)), causal_mask_function)
    assert not torch.equal(evaluate_mask(function, query, key), visible(layers[0].spec, query, key))


def test_pairs_touch_both_sides_of_every_window_edge(family_directory: FamilyDirectory) -> None:
    model, layers = open_layers(family_directory("mistral"))
    for window in (1, 24, 4096, 131_072, 1_000_000):
        spec = replace(layers[0].spec, window=window)
        query, key = _pairs(_edges(model.config, [spec]), 1 << 24)
        assert {window - 1, window} <= set((query - key).tolist())
        function = and_masks(sliding_window_overlay(window), causal_mask_function)
        assert torch.equal(evaluate_mask(function, query, key), visible(spec, query, key))


def test_scalar_only_predicates_are_vmapped() -> None:
    def scalar(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if query.dim():
            raise RuntimeError("scalars only")
        return key <= query

    query, key = torch.tensor([1, 2, 3]), torch.tensor([2, 2, 2])
    assert evaluate_mask(scalar, query, key).tolist() == [False, True, True]
