"""Weights are views of the files, and nothing is ever initialised at random."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ringserve.config import ModelConfig
from ringserve.errors import CheckpointError
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.loading import load_checked
from ringserve.model.weights import load_model
from tests.families import FAMILIES, write_family
from tests.ringserve.conftest import FamilyDirectory

CHANGED = "model.layers.1.self_attn.q_proj.weight"


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    return load_model(read_checkpoint(ModelConfig(model=str(directory))), "cpu", dtype)


def mapped_ranges(directory: Path) -> list[range]:
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(directory / "model.safetensors")):
            begin, end = line.split()[0].split("-")
            ranges.append(range(int(begin, 16), int(end, 16)))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3-moe"])
def test_parameters_are_views_of_the_file(family: str, family_directory: FamilyDirectory) -> None:
    directory = family_directory(family)
    model = load(directory)
    ranges = mapped_ranges(directory)
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in mapped for mapped in ranges), f"{name} was copied"


def test_values_are_the_files_in_evaluation_mode(family_directory: FamilyDirectory) -> None:
    model = load(family_directory("llama"))
    tensors = load_file(family_directory("llama") / "model.safetensors")
    assert not model.training
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, tensors[name])


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "qwen3-moe"])
def test_fp64(family: str, family_directory: FamilyDirectory) -> None:
    checkpoint = read_checkpoint(ModelConfig(model=str(family_directory(family))))
    model, layers = load_checked(checkpoint, torch.device("cpu"), torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert len(layers) == 4


def test_bf16_is_the_default_of_a_bf16_checkpoint(tmp_path: Path) -> None:
    write_family("llama", tmp_path, torch.bfloat16)
    checkpoint = read_checkpoint(ModelConfig(model=str(tmp_path)))
    assert checkpoint.dtype == "bfloat16"
    model, _ = load_checked(checkpoint, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_tensors(tmp_path: Path) -> None:
    write_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(CHANGED))
    with pytest.raises(CheckpointError, match=rf"1 tensors of LlamaForCausalLM are missing .*{CHANGED}"):
        load(tmp_path)


@pytest.mark.parametrize("parts, reason", [
    (["up"], "experts of a layer are not all there"),
    (["gate", "up"], r"layers\.2\.mlp\.experts\.gate_up_proj: \[3, 64, 64\] instead of \[4, 64, 64\]"),
    (["down"], r"layers\.2\.mlp\.experts\.down_proj: \[3, "),
])
def test_a_missing_expert(parts: list[str], reason: str, tmp_path: Path) -> None:
    write_family("qwen3-moe", tmp_path)
    names = [f"model.layers.2.mlp.experts.1.{part}_proj.weight" for part in parts]
    rewrite(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path)


def test_an_untied_head_that_is_missing(tmp_path: Path) -> None:
    write_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing .*lm_head\.weight"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_converted(dtype: torch.dtype, family_directory: FamilyDirectory) -> None:
    directory = family_directory("llama")
    tensors = load_file(directory / "model.safetensors")
    for name, parameter in load(directory, dtype).named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, tensors[name].to(dtype))


def test_tensors_of_another_shape(tmp_path: Path) -> None:
    write_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({CHANGED: torch.zeros(8, 64)}))
    with pytest.raises(CheckpointError, match=rf"{CHANGED}: \[8, 64\] instead of \[64, 64\]"):
        load(tmp_path)


def test_tensors_without_a_place_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_family("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.extra": torch.zeros(1)}))
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert "model.layers.0.self_attn.extra" in caplog.text


def test_loading_is_silent(family_directory: FamilyDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    load(family_directory("llama"))
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_of_another_size(tmp_path: Path) -> None:
    write_family("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"missing .*model\.layers\.4"):
        load(tmp_path)
