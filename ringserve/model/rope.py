"""Rotary frequencies: fixed when the model loads, and angles that stay right beyond a million positions.

transformers computes `position.float() * inv_freq` in fp32. At ten million one unit in the last place of that
product is a whole radian, so from EXACT_BELOW on the rows of cos and sin are computed in fp64 from the same
frequencies. Rows below it keep transformers' numbers bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ringserve.errors import UnsupportedModelError
from ringserve.model.context_length import DYNAMIC_REASON

EXACT_BELOW = 1 << 20
FIXED = "fixed"


def fix_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Makes every rotary module's frequencies independent of the positions of a call.

    longrope has a short and a long set, chosen here once by `max_model_len`. When the context reaches beyond
    EXACT_BELOW, the far rows are computed in fp64.
    """
    for name, module in model.named_modules():
        if "inv_freq" not in {buffer.split("_", 1)[-1][-8:] for buffer in module._buffers}:
            continue
        for layer_type in _layer_types(module):
            _fix_rope_type(module, layer_type, max_model_len)
        if max_model_len > EXACT_BELOW:
            _extend(name, module)


def _layer_types(module: nn.Module) -> list[str | None]:
    """The keys of the module's frequency sets: [None] for the usual one, or one per layer type (Gemma 3)."""
    names = [name for name in module._buffers if name.endswith("inv_freq")]
    return [name.removesuffix("inv_freq").removesuffix("_") or None for name in names
            if not name.endswith("original_inv_freq")]


def _fix_rope_type(module: Any, layer_type: str | None, max_model_len: int) -> None:
    """Replace longrope's choice per call by one made now; refuse frequencies that follow the length."""
    rope_type = module.rope_type if layer_type is None else module.rope_type[layer_type]
    if "dynamic" in rope_type:
        raise UnsupportedModelError(DYNAMIC_REASON)
    if rope_type != "longrope":
        return
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    original = parameters["original_max_position_embeddings"]
    if max_model_len > original:
        named = {} if layer_type is None else {"layer_type": layer_type}
        frequencies = _buffer(module, layer_type)
        # A length beyond the original one is how transformers is asked for the long set.
        long_set, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, frequencies.device, seq_len=original + 1,
                                                      **named)
        frequencies.copy_(long_set)
    # Any other name keeps `dynamic_rope_update` from choosing again.
    if layer_type is None:
        module.rope_type = FIXED
    else:
        module.rope_type = {**module.rope_type, layer_type: FIXED}


def _buffer(module: nn.Module, layer_type: str | None) -> Tensor:
    frequencies = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
    assert isinstance(frequencies, Tensor)
    return frequencies


def _extend(name: str, module: Any) -> None:
    """Wrap the module's forward: rows at far positions are computed again in fp64."""
    inner = module.forward
    layouts = {layer_type: _layout(name, module, inner, layer_type) for layer_type in _layer_types(module)}

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        named = {} if layer_type is None else {"layer_type": layer_type}
        cos, sin = inner(x, position_ids, **named)
        far = position_ids >= EXACT_BELOW
        if bool(far.any()):
            angles = position_ids[far][:, None].double() * _buffer(module, layer_type).double()
            angles, scaling = layouts[layer_type](angles), _scaling(module, layer_type)
            cos[far] = (angles.cos() * scaling).to(cos.dtype)
            sin[far] = (angles.sin() * scaling).to(sin.dtype)
        return cos, sin

    module.forward = forward


def _scaling(module: Any, layer_type: str | None) -> float:
    name = "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"
    return float(getattr(module, name))


def _layout(name: str, module: Any, inner: Callable[..., Any], layer_type: str | None,
            ) -> Callable[[Tensor], Tensor]:
    """How the module lays angles out over the head dimension, found by asking it for one position."""
    frequencies = _buffer(module, layer_type)
    position = torch.tensor([[3]], device=frequencies.device)
    named = {} if layer_type is None else {"layer_type": layer_type}
    cos = inner(torch.zeros(1, dtype=torch.float32, device=frequencies.device), position, **named)
    angles = 3.0 * frequencies[None].float()
    for layout in (_once, _twice, _interleaved):
        expected = layout(angles).cos() * _scaling(module, layer_type)
        if (isinstance(cos, tuple) and cos[0].shape[1:] == expected.shape
                and torch.allclose(cos[0][0], expected)):
            return layout
    raise UnsupportedModelError(f"the rotary embedding {name} lays its angles out in a way that ringserve "
                                f"cannot continue beyond {EXACT_BELOW} positions: lower max_model_len")


def _once(angles: Tensor) -> Tensor:
    return angles


def _twice(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), dim=-1)


def _interleaved(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, dim=-1)
