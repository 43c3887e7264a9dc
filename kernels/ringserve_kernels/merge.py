"""Merging partial attention results: the arithmetic that makes a split of the keys exact.

Shape suffixes: T rows, H query heads, D value dim. Contract at every boundary: `lse_TH` is fp32 (fp64 for fp64
inputs), natural logarithm, -inf where a row sees no key, and `o_THD` is 0 there.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]
"""(o, lse): a partial result, or the accumulators."""
Rows = slice | Tensor
"""Which rows of an accumulator a partial belongs to: a range, or distinct indices (int64)."""


def new_state(rows: int, heads: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity of the merge, (0, -inf), as accumulators for queries of `dtype`: at least fp32, because
    re-rounding to bf16 at each merge costs 1% at 64 ranks. Memory is head-major, as the kernels write."""
    dtype = torch.promote_types(dtype, torch.float32)
    o_THD = torch.zeros(heads, rows, value_dim, dtype=dtype, device=device).transpose(0, 1)
    lse_TH = torch.full((heads, rows), -torch.inf, dtype=dtype, device=device).transpose(0, 1)
    return o_THD, lse_TH


def merge_attention_states(o_THD: Tensor, lse_TH: Tensor, other_o_THD: Tensor, other_lse_TH: Tensor) -> None:
    """Fold another partial over *other* keys into the accumulators (o, lse), in place.

    Equivalent to one softmax over both sets of keys: with m = max(l, l'), a = exp(l - m), b = exp(l' - m),
    o becomes (a o + b o') / (a + b) and l becomes m + log(a + b) (online softmax; FlashAttention, Dao et al.
    2022, section 3.1). Associative and commutative up to rounding; identity (0, -inf); two identities give the
    identity, where the popular sigmoid form gives NaN. Values that agree are kept exactly: V = 1 gives 1.
    """
    top = torch.maximum(lse_TH, other_lse_TH)
    top = torch.where(top == -torch.inf, 0.0, top)
    a = torch.exp(lse_TH - top)
    b = torch.exp(other_lse_TH - top)
    total = a.add_(b)
    # total >= 1 wherever a row has seen a key; the clamp only turns 0/0 into 0.
    weight = b.div_(total.clamp(min=1.0))
    o_THD.lerp_(other_o_THD.to(o_THD.dtype), weight.unsqueeze(-1))
    torch.add(top, total.log_(), out=lse_TH)


def merge_rows(o_THD: Tensor, lse_TH: Tensor, rows: Rows, other_o_THD: Tensor, other_lse_TH: Tensor) -> None:
    """`merge_attention_states` into the named rows only."""
    if isinstance(rows, slice):
        merge_attention_states(o_THD[rows], lse_TH[rows], other_o_THD, other_lse_TH)
        return
    some_o, some_lse = o_THD[rows], lse_TH[rows]
    merge_attention_states(some_o, some_lse, other_o_THD, other_lse_TH)
    o_THD[rows], lse_TH[rows] = some_o, some_lse


def merge_sink(o_THD: Tensor, lse_TH: Tensor, sink_H: Tensor) -> None:
    """Fold the sink, a key without a value whose score is `sink_H`, into the accumulators, in place.

    Once per row, where the row lives: a sink merged on every rank would be counted once per rank.
    """
    sink_H = sink_H.to(lse_TH.dtype)
    o_THD.mul_(torch.sigmoid(lse_TH - sink_H).unsqueeze(-1))
    torch.logaddexp(lse_TH, sink_H.expand_as(lse_TH), out=lse_TH)
