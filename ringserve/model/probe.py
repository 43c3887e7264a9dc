"""One short forward that shows what each attention layer is asked to compute, and with which mask.

For the length of a probe the model runs under a private attention name with a mask function of its own. That
function receives the mask as transformers composes it, a predicate over (batch, head, query, key), and hands
it to the layers unevaluated, in place of a mask tensor. So one forward of two tokens yields everything:
shapes, scale, window, soft cap, sinks, and a predicate that can be asked about token indices in the millions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ringserve.errors import UnsupportedModelError
from ringserve.model.quiet import first_line, quiet_transformers

PROBE_NAME = "ringserve_probe"

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LazyMask:
    """Stands where a mask tensor would; a model that does more than pass it on is refused."""

    function: MaskFunction


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface: what the layer passed."""

    module: nn.Module
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: object
    options: dict[str, Any]
    """Every keyword argument."""


class CallLog:
    """Takes the place of the step's metadata while a model is probed."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[AttentionCall] = []
        self._names = {id(module): name for name, module in model.named_modules()}

    def add(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object,
            options: dict[str, Any]) -> None:
        self.calls.append(AttentionCall(module, self._names.get(id(module), type(module).__name__),
                                        query, key, value, mask, options))


def probe(model: nn.Module, token_ids: Sequence[int], position_ids: Sequence[int]) -> list[AttentionCall]:
    """Runs the model once with attention that returns zeros; the calls in the order they were made."""
    log = CallLog(model)
    with attention_name(model, PROBE_NAME):
        run_model(model, token_ids, position_ids, log)
    return log.calls


@torch.no_grad()
def run_model(model: nn.Module, token_ids: Sequence[int], position_ids: Sequence[int],
              ring_step: object) -> Tensor:
    """The logits [T, V] of a few tokens; a failure inside transformers is the model's, not the server's."""
    device = next(model.parameters()).device
    ids, positions = (torch.tensor([list(values)], device=device) for values in (token_ids, position_ids))
    step = {} if ring_step is None else {"ring_step": ring_step}
    try:
        with quiet_transformers():
            output = model(input_ids=ids, position_ids=positions, use_cache=False,
                           logits_to_keep=torch.arange(len(token_ids), device=device), **step)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run with ringserve's attention: {first_line(error)}") from error
    logits: Tensor = output.logits[0]
    return logits


@contextmanager
def attention_name(model: nn.Module, name: str) -> Iterator[None]:
    """The model under another attention function, by its name in transformers' registry."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _probe_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: object = None, *, ring_step: CallLog | None = None, **options: Any,
                     ) -> tuple[Tensor, None]:
    if ring_step is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function, which "
            "the ring needs")
    ring_step.add(module, query, key, value, attention_mask, options)
    batch, n_heads, n_tokens, _ = query.shape
    return query.new_zeros(batch, n_tokens, n_heads, value.shape[-1]), None


def _lazy_mask(*_: Any, mask_function: MaskFunction, attention_mask: object = None, **__: Any) -> LazyMask:
    if attention_mask is not None:
        raise UnsupportedModelError("the model makes a padding mask of its own")
    return LazyMask(mask_function)


AttentionInterface.register(PROBE_NAME, _probe_attention)
AttentionMaskInterface.register(PROBE_NAME, _lazy_mask)
