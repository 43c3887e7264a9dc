"""A directory that cannot be served is refused with one line that names what is wrong; no weight is read."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import transformers

from ringserve.config import ModelConfig
from ringserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from ringserve.model.checkpoint import Checkpoint, read_checkpoint
from tests.families import END_ID, FAMILIES, MAX_POSITIONS, VOCABULARY
from tests.ringserve.conftest import FamilyDirectory
from tests.ringserve.model.conftest import WriteCheckpoint


@pytest.fixture
def directory(family_directory: FamilyDirectory, tmp_path: Path) -> Path:
    """A llama checkpoint to damage."""
    return Path(shutil.copytree(family_directory("llama"), tmp_path / "model"))


def read(path: Path, **fields: Any) -> Checkpoint:
    return read_checkpoint(ModelConfig(model=str(path), **fields))


def edit(file: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {name: value for name, value in (content | changes).items() if value is not None}
    file.write_text(json.dumps(content))


def refusal(path: Path, kind: type[Exception] = CheckpointError, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        read(path, **fields)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def split_in_two(directory: Path) -> None:
    """The single weights file as two shards and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: tensors[name].clone() for name in members}, directory / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str, family_directory: FamilyDirectory) -> None:
    checkpoint = read(family_directory(family))
    assert checkpoint.architecture.endswith("ForCausalLM")
    # transformers gives every gpt-oss YaRN over 32 times 4,096 positions unless it says otherwise.
    length = 131_072 if family == "gpt-oss" else MAX_POSITIONS
    assert (checkpoint.vocab_size, checkpoint.max_model_len) == (VOCABULARY, length)
    assert checkpoint.dtype == "float32"
    assert checkpoint.eos_token_ids == (END_ID,)
    assert 0 < checkpoint.weight_bytes < (checkpoint.path / "model.safetensors").stat().st_size


class TestFiles:
    def test_no_directory(self, tmp_path: Path) -> None:
        assert "does not exist" in refusal(tmp_path / "absent")
        (tmp_path / "file").touch()
        assert "is a file" in refusal(tmp_path / "file")
        assert "config.json" in refusal(tmp_path)

    @pytest.mark.parametrize("text, word", [
        ("{", "not valid JSON"), ("[]", "JSON object"), ("\xff", "not valid JSON")])
    def test_config_that_does_not_parse(self, directory: Path, text: str, word: str) -> None:
        (directory / "config.json").write_bytes(text.encode("latin-1"))
        assert word in refusal(directory)

    def test_config_that_transformers_refuses(self, directory: Path) -> None:
        edit(directory / "config.json", num_attention_heads="many")
        assert "config.json" in refusal(directory)

    def test_no_tokenizer(self, directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        assert "tokenizer.json" in refusal(directory)

    @pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -4096])
    def test_truncated_file(self, directory: Path, kept: int) -> None:
        file = directory / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:kept] if kept else b"")
        assert "truncated" in refusal(directory)

    def test_trailing_bytes(self, directory: Path) -> None:
        with (directory / "model.safetensors").open("ab") as stream:
            stream.write(b"\0")
        assert "longer" in refusal(directory)

    @pytest.mark.parametrize("header", [
        b"[1]", b"{}x", b'{"w": 1}', b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b'{"w": {"dtype": "F32"}}'])
    def test_damaged_header(self, directory: Path, header: bytes) -> None:
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        refusal(directory)

    def test_git_lfs_pointer(self, directory: Path) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        (directory / "model.safetensors").write_text(pointer)
        assert "git lfs pull" in refusal(directory)

    def test_pickle_only(self, directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        assert "convert them to safetensors" in refusal(directory)

    def test_no_weights(self, directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        assert "neither" in refusal(directory)

    def test_shards(self, directory: Path) -> None:
        whole = read(directory)
        split_in_two(directory)
        assert read(directory).weight_bytes == whole.weight_bytes
        (directory / "model-2.safetensors").rename(directory / "elsewhere")
        assert "1 of the 2 weight files" in refusal(directory)
        shutil.copy(directory / "model-1.safetensors", directory / "model-2.safetensors")
        assert "model-2.safetensors lacks" in refusal(directory)

    @pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"w": "../model.safetensors"}},
                                       {"weight_map": {"w": 3}}])
    def test_damaged_index(self, directory: Path, index: dict[str, Any]) -> None:
        (directory / "model.safetensors").rename(directory / "elsewhere")
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "index.json" in refusal(directory)


class TestKind:
    @pytest.mark.parametrize("changes, word", [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         "encoder-decoder"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "not a causal"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal"),
        ({"architectures": None}, "without architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}},
         "modalities"),
        ({"model_type": "secret", "auto_map": {"AutoConfig": "code.Config"}}, "never run"),
        ({"model_type": "secret"}, "not known"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ])
    def test_refused(self, directory: Path, changes: dict[str, Any], word: str) -> None:
        edit(directory / "config.json", **changes)
        assert word in refusal(directory, UnsupportedModelError)

    def test_code_of_its_own_is_ignored_where_transformers_has_the_model(self, directory: Path) -> None:
        edit(directory / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
        (directory / "code.py").write_text("raise SystemExit('was run')")
        assert read(directory).architecture == "LlamaForCausalLM"


class TestFields:
    def test_dtype(self, directory: Path) -> None:
        edit(directory / "config.json", dtype="bfloat16")
        assert read(directory).dtype == "bfloat16"
        edit(directory / "config.json", dtype=None)
        assert read(directory).dtype == "float32", "what the weights are stored in"
        assert read(directory, dtype="float16").dtype == "float16"
        edit(directory / "config.json", torch_dtype="float16")
        assert read(directory).dtype == "float16", "the old name"

    def test_end_tokens(self, directory: Path) -> None:
        edit(directory / "generation_config.json", eos_token_id=[7, 9])
        assert read(directory).eos_token_ids == (7, 9)
        edit(directory / "generation_config.json", eos_token_id=None)
        assert read(directory).eos_token_ids == (END_ID,), "from config.json"
        (directory / "generation_config.json").unlink()
        edit(directory / "config.json", eos_token_id=None)
        assert read(directory).eos_token_ids == ()

    @pytest.mark.parametrize("ids", ["2", [2, "3"], {"a": 1}])
    def test_end_tokens_that_are_no_numbers(self, directory: Path, ids: object) -> None:
        edit(directory / "generation_config.json", eos_token_id=ids)
        assert "eos_token_id" in refusal(directory)

    def test_generation_config_that_does_not_parse(self, directory: Path) -> None:
        (directory / "generation_config.json").write_text("{")
        assert "generation_config.json is not valid JSON" in refusal(directory)

    def test_default_sampling(self, directory: Path) -> None:
        assert read(directory).default_sampling == {}
        edit(directory / "generation_config.json", temperature=0.6, top_p=0.95, top_k=20, max_length=5)
        assert read(directory).default_sampling == {}, "only when it samples"
        edit(directory / "generation_config.json", do_sample=True)
        assert read(directory).default_sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


class TestContextLength:
    def test_within_the_checkpoint(self, directory: Path) -> None:
        assert read(directory, max_model_len=100).max_model_len == 100
        assert read(directory, max_model_len=MAX_POSITIONS).max_model_len == MAX_POSITIONS

    def test_beyond_it(self, directory: Path) -> None:
        message = refusal(directory, ConfigError, max_model_len=MAX_POSITIONS + 1)
        assert str(MAX_POSITIONS) in message and str(MAX_POSITIONS + 1) in message
        assert "rope_scaling" in message

    @pytest.mark.parametrize("scaling, limit", [
        ({"rope_type": "yarn", "factor": 4.0}, 4 * MAX_POSITIONS),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"type": "linear", "factor": 2}, 2 * MAX_POSITIONS),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}, 8192),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
         2 * MAX_POSITIONS)])
    def test_scaled(self, directory: Path, scaling: dict[str, Any], limit: int) -> None:
        text = json.dumps(scaling)
        checkpoint = read(directory, rope_scaling=text)
        assert checkpoint.max_model_len == limit
        assert checkpoint.config.rope_parameters["rope_theta"] == 10000.0
        assert checkpoint.config.rope_parameters["rope_type"] == scaling.get("rope_type", "linear")
        assert str(limit) in refusal(directory, ConfigError, rope_scaling=text, max_model_len=limit + 1)

    @pytest.mark.parametrize("text, word", [
        ("{", "JSON"), ("3", "object"), ('{"rope_type": "dynamic", "factor": 2.0}', "dynamic"),
        ('{"rope_type": "new"}', "known are"), ('{"rope_type": "yarn"}', "factor"),
        ('{"rope_type": "linear", "factor": 0.5}', "factor"), ('{"factor": 2.0}', "rope_type"),
        ('{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}', "original"),
        ('{"rope_type": "llama3", "factor": 2.0}', "does not fit"),
        ('{"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]}',
         "does not fit")])
    def test_scaling_that_cannot_work(self, directory: Path, text: str, word: str) -> None:
        assert word in refusal(directory, ConfigError, rope_scaling=text)

    def test_scaling_of_gemma3_is_for_its_full_layers(self, family_directory: FamilyDirectory) -> None:
        checkpoint = read(family_directory("gemma3"), rope_scaling='{"rope_type": "linear", "factor": 8.0}')
        parameters = checkpoint.config.rope_parameters
        assert parameters["full_attention"]["factor"] == 8.0
        assert parameters["sliding_attention"]["rope_type"] == "default"
        assert parameters["full_attention"]["rope_theta"] == 1_000_000.0

    def test_phi3_knows_longrope_only(self, family_directory: FamilyDirectory) -> None:
        scaling = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 512,
                   "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        path = family_directory("phi3-longrope")
        checkpoint = read(path, rope_scaling=json.dumps(scaling))
        assert checkpoint.max_model_len == 4096
        # transformers keeps a second copy of the original length, which would win.
        assert checkpoint.config.rope_parameters["original_max_position_embeddings"] == 512
        assert "longrope" in refusal(path, ConfigError, rope_scaling='{"rope_type": "yarn", "factor": 4.0}')

    def test_scaling_a_model_without_rotary_positions(self, write_checkpoint: WriteCheckpoint) -> None:
        path = write_checkpoint(transformers.GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64))
        assert read(path).max_model_len == 64
        text = '{"rope_type": "linear", "factor": 2.0}'
        assert "no rotary position embedding" in refusal(path, ConfigError, rope_scaling=text)

    def test_a_checkpoint_that_says_no_length(self, write_checkpoint: WriteCheckpoint) -> None:
        path = write_checkpoint(transformers.BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2))
        assert "max_position_embeddings" in refusal(path)

    def test_yarn_in_the_checkpoint_counts(self, directory: Path) -> None:
        edit(directory / "config.json", rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048})
        assert read(directory).max_model_len == 8192
