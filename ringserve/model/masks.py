"""The masks that transformers would build, compared with what the specs say.

No mask tensor is ever built here or later: the composed predicate of each layer (see probe.py) is asked about
pairs of token indices around every edge that its spec and its configuration could give it.
"""

import math
from typing import Any

import torch
from ringserve_kernels.spec import AttentionSpec
from torch import Tensor, nn

from ringserve.errors import UnsupportedModelError
from ringserve.model.layers import AttentionLayer, ordered_calls
from ringserve.model.probe import LazyMask, MaskFunction, probe
from ringserve.model.quiet import first_line

LARGEST_INDEX = 1 << 24  # masks are asked up to here even when the server's context is shorter
RANDOM_PAIRS = 20_000


def check_masks(model: nn.Module, layers: list[AttentionLayer], max_model_len: int = LARGEST_INDEX) -> None:
    """UnsupportedModelError unless every layer's mask is exactly causal plus its spec's window."""
    calls = ordered_calls(model, probe(model, [0, 1], [0, 1]))
    edges = _edges(model.config, [layer.spec for layer in layers])
    query, key = _pairs(edges, max(max_model_len, LARGEST_INDEX))
    seen: dict[tuple[int, int | None], None] = {}
    for call, layer in zip(calls, layers, strict=True):
        if not isinstance(call.mask, LazyMask):
            found = "no mask" if call.mask is None else f"a {type(call.mask).__name__} of its own making"
            raise UnsupportedModelError(
                f"{layer.name} attends with {found} instead of a mask from transformers' mask functions")
        # Layers of one kind share one predicate: it is asked once per window.
        if (id(call.mask), layer.spec.window) not in seen:
            seen[id(call.mask), layer.spec.window] = None
            _compare(call.mask.function, layer, query, key)


def _compare(function: MaskFunction, layer: AttentionLayer, query: Tensor, key: Tensor) -> None:
    expected = visible(layer.spec, query, key)
    wrong = evaluate_mask(function, query, key) != expected
    if wrong.any():
        i = int(wrong.nonzero()[0])
        window = "no window" if layer.spec.window is None else f"a window of {layer.spec.window}"
        verb, preposition = ("hides", "from") if expected[i] else ("shows", "to")
        raise UnsupportedModelError(
            f"{layer.name} asks its attention function for {window}, but its mask {verb} token {int(key[i])} "
            f"{preposition} token {int(query[i])}: the model attends in another pattern (such as chunks) "
            "that only its mask knows")


def visible(spec: AttentionSpec, query: Tensor, key: Tensor) -> Tensor:
    """Whether the tokens with indices `query` see those with indices `key`, by the spec."""
    causal = key <= query
    return causal if spec.window is None else causal & (key > query - spec.window)


def evaluate_mask(function: MaskFunction, query: Tensor, key: Tensor) -> Tensor:
    """A predicate of transformers at pairs [n] of indices. Those that only work on scalars are vmapped."""
    zero = query.new_zeros(())
    try:
        try:
            result = function(zero, zero, query, key)
        except RuntimeError:
            result = torch.vmap(function, in_dims=(None, None, 0, 0))(zero, zero, query, key)
    except Exception as error:
        raise UnsupportedModelError(
            f"the model's mask cannot be asked about single pairs of tokens: {first_line(error)}") from error
    return result.expand_as(query)


def _edges(config: Any, specs: list[AttentionSpec]) -> list[int]:
    """Where a mask could change: at the windows, every integer of the configuration, powers of two."""
    edges = {spec.window for spec in specs if spec.window is not None} | {1 << i for i in range(25)}
    pending: list[object] = [config.to_dict()]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_INDEX:
            edges.add(value)
    return sorted(edges)


def _pairs(edges: list[int], n_tokens: int) -> tuple[Tensor, Tensor]:
    """Query and key indices [n] each: near the start, around every edge, and random ones at all scales."""
    start = torch.arange(8)
    near = torch.cartesian_prod(start, start)
    offsets = torch.tensor([-2, -1, 0, 1, 2])
    base = torch.tensor(edges)
    around = torch.cat([(base[:, None] * multiple + offsets).flatten() for multiple in (0, 1, 2, 3)])
    around = torch.tensor(sorted(set(around.clamp(0, n_tokens - 1).tolist())))
    # Queries just after a multiple of an edge (chunks) and at a distance near an edge (windows).
    distant = torch.cartesian_prod(around, torch.cat([around, -offsets]))
    windows = torch.stack([distant[:, 0] + 3, distant[:, 0] + 3 - distant[:, 1]], dim=1)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(2, RANDOM_PAIRS, generator=generator, dtype=torch.float64)
    far, distance = (scale * math.log(n_tokens)).exp().long()
    random = torch.stack([far, far - distance], dim=1)
    pairs = torch.cat([near, torch.cartesian_prod(around, start), distant, windows, random])
    pairs = pairs[(pairs >= 0).all(dim=1) & (pairs < n_tokens).all(dim=1)]
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
