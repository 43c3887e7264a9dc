"""The kernel that merges the partials of a split sequence into the accumulators.

Shape suffixes: S partials, D value dim padded to a power of two.
"""

import triton
import triton.language as tl

from ringserve_kernels.triton.table import REDUCTION_FIELDS

_FIELDS = tl.constexpr(REDUCTION_FIELDS)


@triton.jit(do_not_specialize=["lse_row_stride", "lse_head_stride"])
def reduction_kernel(partial_o_SHD, partial_lse_SH, reduction_RF,
                     o, o_row_stride, o_head_stride, lse, lse_row_stride, lse_head_stride,
                     HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PARTIALS: tl.constexpr):
    """One split row (axis 0) of one query head (axis 1), PARTIALS of its pieces at a time, in their order."""
    fields = reduction_RF + tl.program_id(0) * _FIELDS
    head = tl.program_id(1).to(tl.int64)
    row, first = tl.load(fields).to(tl.int64), tl.load(fields + 1).to(tl.int64)
    stride, pieces = tl.load(fields + 2), tl.load(fields + 3)
    dim_D = tl.arange(0, PADDED_DIM)
    at = lse + row * lse_row_stride + head * lse_head_stride
    at_D = o + row * o_row_stride + head * o_head_stride + dim_D
    # The accumulators are one more partial, whose weights add up to 1.
    top = tl.load(at)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc_D = tl.load(at_D, mask=dim_D < DIM, other=0.0)
    for begin in range(0, pieces, PARTIALS):
        piece_S = begin + tl.arange(0, PARTIALS)
        live_S = piece_S < pieces
        at_S = (first + piece_S * stride) * HEADS + head
        lse_S = tl.load(partial_lse_SH + at_S, mask=live_S, other=float("-inf"))
        o_SD = tl.load(partial_o_SHD + (at_S * DIM)[:, None] + dim_D[None, :],
                       mask=live_S[:, None] & (dim_D < DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(lse_S, axis=0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight_S = tl.exp(lse_S - finite)
        decay = tl.exp(top - finite)
        acc_D = acc_D * decay + tl.sum(weight_S[:, None] * o_SD, axis=0)
        total = total * decay + tl.sum(weight_S, axis=0)
        top = new_top
    # A total of 0: no piece saw a key. Then o is 0, and top = -inf makes lse -inf. A NaN is no 0 and stays one.
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(at_D, acc_D / divisor, mask=dim_D < DIM)
    tl.store(at, top + tl.log(divisor))
