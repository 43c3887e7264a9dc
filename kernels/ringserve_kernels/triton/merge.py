"""Merging partial attention results on a GPU: one pass over the accumulators.

Shape suffixes: T rows, H query heads, D value dim. In kernels: R pairs of (row, head), D value dim padded to a power
of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringserve_kernels.triton.arguments import check_device, check_rows_contiguous, check_tensor
from ringserve_kernels.triton.launch import Launch

MERGED_PAIRS = 16
"""(row, head) pairs of one program."""


@triton.jit
def merge_weight(lse, other_lse):
    """(weight of the other partial, merged lse): natural logarithms; two -inf give (0, -inf)."""
    top = tl.maximum(lse, other_lse)
    finite = tl.where(top == float("-inf"), 0.0, top)
    b = tl.exp(other_lse - finite)
    total = tl.exp(lse - finite) + b
    # total >= 1 wherever a row has seen a key. A NaN is no 0 and stays one.
    divisor = tl.where(total == 0.0, 1.0, total)
    return b / divisor, top + tl.log(divisor)


@triton.jit
def blend(o, other_o, weight):
    """(1 - weight) o + weight other_o, exact at both ends and where both agree."""
    difference = other_o - o
    return tl.where(weight < 0.5, o + weight * difference, other_o - (1.0 - weight) * difference)


@triton.jit(do_not_specialize=["pairs", "lse_row_stride", "lse_head_stride", "other_lse_row_stride",
                               "other_lse_head_stride"])
def merge_kernel(o, o_row_stride, o_head_stride, lse, lse_row_stride, lse_head_stride,
                 other_o, other_o_row_stride, other_o_head_stride, other_lse, other_lse_row_stride,
                 other_lse_head_stride, pairs,
                 HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAIRS: tl.constexpr):
    pair_R = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    live_R = pair_R < pairs
    row_R, head_R = pair_R // HEADS, pair_R % HEADS
    dim_D = tl.arange(0, PADDED_DIM)
    live_RD = live_R[:, None] & (dim_D < DIM)[None, :]
    at_R = lse + row_R * lse_row_stride + head_R * lse_head_stride
    at_RD = o + (row_R * o_row_stride + head_R * o_head_stride)[:, None] + dim_D[None, :]
    other_R = other_lse + row_R * other_lse_row_stride + head_R * other_lse_head_stride
    other_RD = other_o + (row_R * other_o_row_stride + head_R * other_o_head_stride)[:, None] + dim_D[None, :]
    weight_R, merged_R = merge_weight(tl.load(at_R, mask=live_R, other=0.0), tl.load(other_R, mask=live_R, other=0.0))
    blended_RD = blend(tl.load(at_RD, mask=live_RD, other=0.0),
                       tl.load(other_RD, mask=live_RD, other=0.0).to(tl.float32), weight_R[:, None])
    tl.store(at_RD, blended_RD, mask=live_RD)
    tl.store(at_R, merged_R, mask=live_R)


def triton_merge(o_THD: Tensor, lse_TH: Tensor, other_o_THD: Tensor, other_lse_TH: Tensor) -> None:
    """Fold another partial over *other* keys into the accumulators (o, lse), in place.

    Equivalent to `merge_attention_states` (same mathematics, contract and bounds), in one kernel. `o_THD`, `lse_TH`
    and `other_lse_TH` are fp32, lse in natural logarithm; `other_o_THD` is fp32, fp16 or bf16. Any strides but the
    last. Raises an ArgumentError that names what does not fit.
    """
    rows, heads, dim = o_THD.shape
    check_device("o_THD", o_THD)
    check_tensor("o_THD", o_THD, (None, None, None), [torch.float32], o_THD.device)
    check_tensor("lse_TH", lse_TH, (rows, heads), [torch.float32], o_THD.device)
    check_tensor("other_o_THD", other_o_THD, (rows, heads, dim), [torch.float32, torch.float16, torch.bfloat16],
                 o_THD.device)
    check_tensor("other_lse_TH", other_lse_TH, (rows, heads), [torch.float32], o_THD.device)
    check_rows_contiguous("o_THD", o_THD)
    check_rows_contiguous("other_o_THD", other_o_THD)
    if o_THD.numel() == 0:
        return
    merge_launch(o_THD, lse_TH, other_o_THD, other_lse_TH).run()


def merge_launch(o_THD: Tensor, lse_TH: Tensor, other_o_THD: Tensor, other_lse_TH: Tensor) -> Launch:
    """`triton_merge`, not started, arguments not checked."""
    rows, heads, dim = o_THD.shape
    return Launch(
        merge_kernel, (triton.cdiv(rows * heads, MERGED_PAIRS),),
        (o_THD, *o_THD.stride()[:2], lse_TH, *lse_TH.stride(), other_o_THD, *other_o_THD.stride()[:2],
         other_lse_TH, *other_lse_TH.stride(), rows * heads),
        {"HEADS": heads, "DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "PAIRS": MERGED_PAIRS})
