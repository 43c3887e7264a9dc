"""The attention layers of a loaded model, and the function through which every one of them reaches the ring.

transformers' attention modules call a function looked up by name. Ours is registered under ATTENTION_NAME,
and no mask function is, so transformers builds no L x L mask. The step's metadata is an argument of the
model's forward that reaches the function unchanged:

    model(input_ids, position_ids=..., use_cache=False, logits_to_keep=rows, ring_step=step)
        -> layer i: attention_function(module, q, k, v, None, ring_step=step, ...) -> step.attend(i, q, k, v)
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from ringserve_kernels.spec import AttentionSpec
from torch import Tensor, nn
from transformers import AttentionInterface

from ringserve.errors import UnsupportedModelError
from ringserve.model.probe import AttentionCall, probe

ATTENTION_NAME = "ringserve"

# Arguments of an attention call that a spec holds, and those that describe the caller and not the result.
SPEC_OPTIONS = {"scaling", "sliding_window", "softcap", "s_aux"}
NEUTRAL_OPTIONS = {"dropout", "position_ids", "use_cache", "logits_to_keep", "output_attentions",
                   "output_hidden_states", "output_router_logits", "return_dict", "layer_idx", "training"}


class RingStep(Protocol):
    """What one step of the server means to an attention layer."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, H, T, Dk], key [1, K, T, Dk] (both rotated), value [1, K, T, Dv] -> [1, T, H, Dv].

        The arguments have any strides; the result is contiguous (some models view it).
        """


@dataclass(frozen=True)
class AttentionLayer:
    spec: AttentionSpec
    sinks: Tensor | None
    """One logit per query head; the model's own parameter."""
    name: str


def attention_function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                   attention_mask: Tensor | None = None, *, ring_step: RingStep, **options: Any,
                   ) -> tuple[Tensor, None]:
    """The attention function of every layer. What the options say is in the layer's spec since it loaded."""
    assert attention_mask is None, "no mask function is registered under our name"
    return ring_step.attend(module.layer_idx, query, key, value), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, attention_function)


def record_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers in order, recorded from one short forward; UnsupportedModelError if any works otherwise."""
    return [_record(call) for call in ordered_calls(model, probe(model, [0, 1], [0, 1]))]


def ordered_calls(model: nn.Module, calls: list[AttentionCall]) -> list[AttentionCall]:
    """`calls`, after checking that layers 0 to n-1 made exactly one each, in that order."""
    n_layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    for call, index in zip(calls, indices):
        if not isinstance(index, int):
            raise UnsupportedModelError(f"{call.name} has no layer_idx to tell its keys from other layers'")
    for i in range(n_layers):
        if i not in indices:
            raise UnsupportedModelError(
                f"layer {i} of {type(model).__name__} never called the attention interface: it has a "
                "recurrent state, a convolution or its own attention")
    if indices != list(range(n_layers)):
        raise UnsupportedModelError(
            f"{type(model).__name__} calls the attention interface for layers {indices} instead of once for "
            f"each of {n_layers} in order: cross attention, or several attentions in a layer")
    return calls


def _record(call: AttentionCall) -> AttentionLayer:
    _check_options(call)
    query, key, value = call.query, call.key, call.value
    n_heads, n_kv_heads = query.shape[1], key.shape[1]
    if not (query.shape[2] == key.shape[2] == value.shape[2] and value.shape[1] == n_kv_heads
            and query.shape[3] == key.shape[3] and n_heads % n_kv_heads == 0):
        raise UnsupportedModelError(
            f"{call.name} attends to something else than its own tokens: query {tuple(query.shape)}, key "
            f"{tuple(key.shape)}, value {tuple(value.shape)}")
    scale, window, softcap = (_number(call, option) for option in ("scaling", "sliding_window", "softcap"))
    sinks: Tensor | None = call.options.get("s_aux")
    if sinks is not None and (not isinstance(sinks, Tensor) or sinks.shape != (n_heads,)):
        raise UnsupportedModelError(f"{call.name} has sinks that are not one logit per head")
    spec = AttentionSpec(num_heads=n_heads, num_kv_heads=n_kv_heads, key_dim=query.shape[3],
                         value_dim=value.shape[3], scale=query.shape[3] ** -0.5 if scale is None else scale,
                         window=int(window) if window is not None and window > 0 else None,
                         softcap=softcap, has_sink=sinks is not None)
    return AttentionLayer(spec, None if sinks is None else sinks.detach(), call.name)


def _number(call: AttentionCall, option: str) -> float | None:
    value = call.options.get(option)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UnsupportedModelError(
            f"{call.name} passes {option} as a {type(value).__name__}, not as one number")
    return value


def _check_options(call: AttentionCall) -> None:
    """Everything that would change the result must be something that a spec can say."""
    for option, value in call.options.items():
        if option == "is_causal":
            if value is False:
                raise UnsupportedModelError(f"{call.name} is not causal")
        elif option == "dropout" and value:
            raise UnsupportedModelError(f"{call.name} drops out: the model is in training mode")
        elif option not in SPEC_OPTIONS | NEUTRAL_OPTIONS and value is not None and value is not False:
            raise UnsupportedModelError(
                f"{call.name} passes {option!r} to its attention, which ringserve does not know and will "
                "not ignore")
    if getattr(call.module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{call.name} is not causal")


def forward(model: nn.Module, token_ids: Tensor, position_ids: Tensor, logit_rows: Tensor,
            ring_step: RingStep) -> Tensor:
    """The logits [R, V] of rows `logit_rows` [R] of a step: `token_ids`, `position_ids` [T] in any order."""
    with torch.no_grad():
        # An index tensor, also when it is empty: the number 0 means all rows to transformers.
        output = model(input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False,
                       logits_to_keep=logit_rows, ring_step=ring_step)
    logits: Tensor = output.logits[0]
    assert logits.shape[0] == logit_rows.shape[0], (logits.shape, logit_rows.shape)
    return logits
