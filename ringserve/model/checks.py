"""What a model must not do behind the attention interface, found by three short forwards when it loads.

The server computes tokens in any grouping and order, on any rank. That is right only if tokens meet nowhere
but in attention, positions come from `position_ids` alone, and attention is what the recorded layers say.
"""

import torch
from torch import Tensor, nn

from ringserve.errors import UnsupportedModelError
from ringserve.model.layers import AttentionLayer
from ringserve.model.masks import visible
from ringserve.model.probe import attention_name, probe, run_model


def check_no_other_mixing(model: nn.Module) -> None:
    """UnsupportedModelError if tokens exchange anything outside attention: a convolution, a recurrent state.

    The middle one of three tokens is made NaN, which survives all arithmetic, and attention is made zero: a
    NaN in either neighbour's logits came by another way.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def poison(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 1] = torch.nan
        return output

    handle = embedding.register_forward_hook(poison)
    try:
        logits = run_model(model, [1, 2, 1], [0, 1, 2], ZeroAttention())
    finally:
        handle.remove()
    assert logits[1].isnan().all(), "the poison never reached the logits"
    if not logits[[0, 2]].isfinite().all():
        raise UnsupportedModelError(
            f"{type(model).__name__} mixes tokens outside attention (a recurrent state or a convolution), "
            "which the ring does not carry from chunk to chunk")


def check_positions(model: nn.Module) -> None:
    """UnsupportedModelError if a query or key depends on its row in the step and not on its position."""
    for call in probe(model, [1, 1, 1], [5, 5, 3]):
        for tensor in (call.query, call.key):
            if not torch.allclose(tensor[:, :, 0], tensor[:, :, 1], rtol=1e-2, atol=1e-3):
                raise UnsupportedModelError(
                    f"{call.name} takes positions from the order of the tokens and not from position_ids")


def check_against_eager(model: nn.Module, layers: list[AttentionLayer]) -> None:
    """UnsupportedModelError unless a short prompt gives the logits that transformers' own attention gives."""
    n_tokens = 6
    ids, positions = list(range(1, n_tokens + 1)), list(range(n_tokens))
    with attention_name(model, "eager"):
        expected = run_model(model, ids, positions, None).double()
    actual = run_model(model, ids, positions, PlainAttention(layers, torch.arange(n_tokens))).double()
    # The median of the rows: in 16 bits a token near a tie may choose another expert, which is no fault.
    error = float(((actual - expected).norm(dim=1) / expected.norm(dim=1)).median())
    bound = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
    if not error <= bound:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something in its own attention that it does not tell the "
            f"attention interface: logits differ by {error:.1e} (relative)")


class ZeroAttention:
    """A step whose attention returns zeros."""

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class PlainAttention:
    """A step over one request's tokens with the given indices, by the textbook: all scores at once.

    Quadratic in memory; for checks and tests. Softmax in fp32, as in transformers' eager attention.
    """

    def __init__(self, layers: list[AttentionLayer], indices: Tensor) -> None:
        self.layers = layers
        self.indices = indices

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec, sinks = self.layers[layer_idx].spec, self.layers[layer_idx].sinks
        groups = spec.num_heads // spec.num_kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * spec.scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        indices = self.indices.to(query.device)
        scores = scores.masked_fill(~visible(spec, indices[:, None], indices[None, :]), -torch.inf)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(dim=-1)[..., :key.shape[2]]
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()
