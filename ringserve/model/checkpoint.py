"""Checkpoint: everything about a model directory that can be known, and checked, without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringserve.config import ModelConfig
from ringserve.errors import CheckpointError, InvalidValueError, UnsupportedModelError
from ringserve.model.context_length import (
    apply_rope_scaling,
    check_rope_types,
    choose_max_model_len,
    made_for,
)
from ringserve.model.quiet import first_line, quiet_transformers
from ringserve.model.shards import DTYPE_NAMES, read_json, read_shards
from ringserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    path: Path
    config: "PreTrainedConfig"
    """transformers' configuration with the operator's rope_scaling in it; never edited after this."""
    architecture: str
    max_model_len: int
    dtype: str
    """In torch's words, for example "bfloat16"; never "auto"."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_sampling: dict[str, float]
    """What generation_config.json asks for when it samples: any of SAMPLING_FIELDS."""
    weight_bytes: int
    """Bytes of the tensors in the files, in the dtype they have there."""
    stored_dtype: str
    """The floating dtype of most of these bytes."""

    @property
    def element_bytes(self) -> int:
        """Of one number in `dtype`."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)


def read_checkpoint(config: ModelConfig) -> Checkpoint:
    """Reads and checks the directory `config.model`; no weight is read.

    Raises CheckpointError (damaged or incomplete), UnsupportedModelError (cannot work here) or ConfigError
    (max_model_len and rope_scaling do not fit the model), each with one line that says what to do.
    """
    path = Path(config.model)
    if not path.is_dir():
        raise CheckpointError(
            f"model directory {path} does not exist" if not path.exists() else
            f"{path} is a file; the model must be a directory with config.json and safetensors")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json")
    raw = read_json(path / "config.json")
    _check_kind(raw)
    model_config = _transformers_config(path, raw)
    architecture = _architecture(raw)
    shards = read_shards(path)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(f"{path} has no tokenizer.json")

    if config.rope_scaling is not None:
        limit = apply_rope_scaling(model_config, config.rope_scaling)
    else:
        limit = made_for(model_config)
    check_rope_types(model_config)
    defaults = path / "generation_config.json"
    generation = read_json(defaults) if defaults.is_file() else {}
    return Checkpoint(
        path=path,
        config=model_config,
        architecture=architecture,
        max_model_len=choose_max_model_len(config.max_model_len, limit, config.rope_scaling is not None),
        dtype=config.dtype if config.dtype != "auto" else _checkpoint_dtype(raw, shards.dtype),
        vocab_size=int(model_config.vocab_size),
        eos_token_ids=_eos_token_ids(generation, raw),
        default_sampling=_default_sampling(generation),
        weight_bytes=shards.n_bytes,
        stored_dtype=shards.dtype or "float32",
    )


def _check_kind(raw: dict[str, Any]) -> None:
    """Refuses what is not a plain-text decoder before transformers sees it, so that the reason is ours."""
    if raw.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{_architecture(raw)} is an encoder-decoder; only decoder-only models are served")
    if "quantization_config" in raw:
        settings = raw["quantization_config"]
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise UnsupportedModelError(
            f"the weights are quantised ({method}); only {', '.join(DTYPE_NAMES.values())} weights "
            "are served")
    if "text_config" in raw or "vision_config" in raw or "audio_config" in raw:
        raise UnsupportedModelError(
            f"{_architecture(raw)} wraps a language model with other modalities; only plain-text checkpoints "
            "are served")
    if raw.get("transformers_weights"):
        raise UnsupportedModelError(
            "config.json names its own weights file (transformers_weights); only the standard names of "
            "safetensors files are read")


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    return f"a model of type {raw.get('model_type')!r} without architectures"


def _transformers_config(path: Path, raw: dict[str, Any]) -> "PreTrainedConfig":
    """transformers' configuration of a model class that it ships itself.

    A checkpoint that also names code of its own (`auto_map`) is read with transformers' class or not at all.
    """
    # Imported late: transformers brings torch, seconds that a directory with a plain mistake need not cost.
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, architecture = raw.get("model_type"), _architecture(raw)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    if model_type not in CONFIG_MAPPING and "auto_map" in raw:
        raise UnsupportedModelError(
            f"{architecture} needs code from its own directory (auto_map), which is never run")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"model_type {model_type!r} is not known to the installed transformers")
    if architecture not in ((known,) if isinstance(known, str) else known):
        raise UnsupportedModelError(
            f"{architecture} is not a causal language model that transformers can load"
            + (f" (model_type {model_type!r} has {known})" if known else ""))
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{path / 'config.json'} is not accepted by transformers: {first_line(error)}") from error


def _checkpoint_dtype(raw: dict[str, Any], stored: str | None) -> str:
    dtype = raw.get("dtype") or raw.get("torch_dtype") or stored
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPE_NAMES.values():
        raise CheckpointError(
            f"config.json says dtype {dtype}; set dtype to one of {', '.join(DTYPE_NAMES.values())}")
    return dtype


def _eos_token_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    """From the first source that names any; an int or a list."""
    for source in sources:
        ids = source.get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(f"eos_token_id must be an integer or a list of them, got {ids}")
            return tuple(ids)
    return ()


def _default_sampling(generation: dict[str, Any]) -> dict[str, float]:
    if not generation.get("do_sample"):
        return {}
    found = {name: generation[name] for name in SAMPLING_FIELDS if isinstance(generation.get(name), int | float)}
    if float(found.get("top_k", 0)).is_integer():
        found.update({name: int(value) for name, value in found.items() if name == "top_k"})
    try:
        SamplingParams(**found)
    except InvalidValueError as error:
        raise CheckpointError(f"generation_config.json: {error.message}") from error
    return found
