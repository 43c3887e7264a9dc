"""How long a context a checkpoint was made for, and rotary scaling that extends it when the operator asks."""

import json
from typing import Any

from ringserve.errors import CheckpointError, ConfigError, UnsupportedModelError
from ringserve.model.quiet import first_line, quiet_transformers

# Types whose frequencies transformers computes once from the config. `longrope` has two sets, one of which is
# chosen when the model loads; `dynamic` recomputes them whenever a call is longer than all before it.
FIXED_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope", "proportional")
DYNAMIC_REASON = ("`dynamic` rotary scaling changes the frequencies with the length of each call, so keys "
                  "that are already cached would no longer fit")


def apply_rope_scaling(config: Any, rope_scaling: str) -> int:
    """Writes the operator's rotary scaling into `config` and returns the context length that it gives.

    Where the checkpoint has rotary parameters per layer type (Gemma 3), the scaling belongs to its
    `full_attention` layers: a window layer never sees a distance beyond its window.
    """
    try:
        scaling = json.loads(rope_scaling)
    except ValueError as error:
        raise ConfigError(f"rope_scaling is not valid JSON: {error}") from error
    if not isinstance(scaling, dict):
        raise ConfigError(f"rope_scaling must be a JSON object, got {rope_scaling}")
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    rope_type = scaling.get("rope_type")
    if rope_type == "dynamic":
        raise ConfigError(DYNAMIC_REASON)
    if rope_type not in FIXED_ROPE_TYPES:
        raise ConfigError(
            f"rope_scaling has rope_type {rope_type!r}; known are {', '.join(FIXED_ROPE_TYPES)}")
    factor = scaling.get("factor")
    if rope_type in ("linear", "yarn", "llama3") and (not isinstance(factor, int | float) or factor < 1):
        raise ConfigError(f"rope_scaling of type {rope_type} needs a factor of at least 1, got {factor!r}")

    made_for = _max_position_embeddings(config)
    original = scaling.get("original_max_position_embeddings", made_for)
    if not isinstance(original, int) or original < 1:
        raise ConfigError(f"rope_scaling needs a positive original_max_position_embeddings, got {original!r}")
    if rope_type in ("yarn", "llama3", "longrope"):
        scaling["original_max_position_embeddings"] = original
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = original  # transformers prefers this field (Phi-3)
    _write_rope_parameters(config, scaling)
    return int(original * factor) if isinstance(factor, int | float) else made_for


def _write_rope_parameters(config: Any, scaling: dict[str, Any]) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ConfigError("rope_scaling was given, but this model has no rotary position embedding to scale")
    nested = config.nested_rope_parameter_keys(parameters)
    if nested and "full_attention" not in nested:
        raise ConfigError(f"rope_scaling cannot be applied to rotary parameters per {', '.join(nested)}")
    layer_type = "full_attention" if nested else None
    old = parameters[layer_type] if layer_type else parameters
    kept = {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if old.get(name) is not None}
    config.rope_parameters = {**parameters, layer_type: kept | scaling} if layer_type else kept | scaling
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # imports torch, which costs seconds
    try:
        with quiet_transformers():
            config.standardize_rope_params()
            config.validate_rope()
            if scaling["rope_type"] != "default":
                inv_freq, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, layer_type=layer_type)
                n_dims = _n_rotary_dims(config, kept)
                for name in ("short_factor", "long_factor"):
                    # torch would stretch a list of one over all frequencies
                    if len(scaling.get(name, inv_freq)) != n_dims // 2:
                        raise ValueError(f"{name} must have {n_dims // 2} numbers")
    except Exception as error:
        raise ConfigError(f"rope_scaling does not fit this model: {first_line(error)}") from error


def _n_rotary_dims(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def rope_parameter_sets(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of the model: none, one set, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return []
    nested = config.nested_rope_parameter_keys(parameters)
    return [parameters[key] for key in nested if parameters[key]] if nested else [parameters]


def check_rope_types(config: Any) -> None:
    for parameters in rope_parameter_sets(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "dynamic":
            raise UnsupportedModelError(f"{DYNAMIC_REASON}; set rope_scaling to a fixed type such as yarn")
        if rope_type not in FIXED_ROPE_TYPES:
            raise UnsupportedModelError(f"rotary type {rope_type!r} is not supported")


def made_for(config: Any) -> int:
    """Tokens the checkpoint was made for. A YaRN checkpoint may state only its factor and original length."""
    length = _max_position_embeddings(config)
    for parameters in rope_parameter_sets(config):
        factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "yarn" and factor and original:
            length = max(length, int(original * factor))
    return length


def choose_max_model_len(asked: int | None, limit: int, scaled: bool) -> int:
    """The server's context length: what was asked for, which must not exceed what the model can do."""
    if asked is None or asked <= limit:
        return asked or limit
    if scaled:
        raise ConfigError(f"max_model_len {asked} is more than the {limit} tokens that rope_scaling extends "
                          "this checkpoint to")
    raise ConfigError(f"max_model_len {asked} is more than the {limit} tokens this checkpoint was made for; "
                      "set rope_scaling to extend it")


def _max_position_embeddings(config: Any) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise CheckpointError("config.json has no max_position_embeddings to say what length the "
                              f"{config.model_type} checkpoint was made for")
    return length
