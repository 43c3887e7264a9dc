"""The kernel of paged attention: one tile of rows over a range of keys of a paged cache.

Shape suffixes: M packed rows (a row of q times the query heads of one kv head, so that each key is read once for all
of them), N keys of a tile, D key or value dim, padded to a power of two under a mask.

Online softmax in base 2 (FlashAttention, Dao et al. 2022, algorithm 1; split keys: Flash-Decoding, Dao et al. 2023).
Products accumulate in fp32; fp32 inputs are multiplied as three tf32 products, which keeps fp32's accuracy.
"""

import triton
import triton.language as tl

from ringserve_kernels.triton.quantized import PLAIN, decode
from ringserve_kernels.triton.table import ITEM_FIELDS

_FIELDS = tl.constexpr(ITEM_FIELDS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """To 1e-7 absolute. From 15 on it is 1 in fp32, and the exponential does not overflow; a NaN stays one."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.where(x > 15.0, 15.0, x)))


@triton.jit
def _load_keys(base, token_stride, token_N, live_N, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
               MASKED: tl.constexpr):
    """[N, D] of keys or values, 0 where there is none: free slots may hold NaN, and 0 * NaN is NaN."""
    dim_D = tl.arange(0, PADDED_DIM)
    at_ND = base + (token_N * token_stride)[:, None] + dim_D[None, :]
    if MASKED:
        return tl.load(at_ND, mask=live_N[:, None] & (dim_D < DIM)[None, :], other=0)
    if DIM < PADDED_DIM:
        return tl.load(at_ND, mask=(dim_D < DIM)[None, :], other=0)
    return tl.load(at_ND)


@triton.jit
def _fold_keys(acc_MD, total_M, top_M, q_MD, row_index_M, position_N, limit,
               k, k_token_stride, k_scale, v, v_token_stride, v_scale,
               block_first, block_length, block_offset, score_scale, softcap, window,
               KEY_DIM: tl.constexpr, PADDED_KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
               PADDED_VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr,
               CODE_UNIT: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
               PRECISION: tl.constexpr):
    """One tile of keys, at these positions before `limit`, folded into the softmax."""
    block_N = position_N // BLOCK_SIZE
    within_N = position_N % BLOCK_SIZE
    live_N = position_N < limit
    if MASKED:
        live_N &= within_N < tl.load(block_length + block_N, mask=live_N, other=0)
        offset_N = tl.load(block_offset + block_N, mask=live_N, other=0)
    else:
        offset_N = tl.load(block_offset + block_N)
    token_N = (offset_N + within_N).to(tl.int64)

    k_ND = decode(_load_keys(k, k_token_stride, token_N, live_N, KEY_DIM, PADDED_KEY_DIM, MASKED), FORMAT, q_MD.dtype)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
    if FORMAT != PLAIN:
        scores_MN *= tl.load(k_scale + token_N, mask=live_N, other=0.0).to(tl.float32)[None, :]
    if SOFTCAPPED:
        scores_MN = (softcap * _LOG2_E) * _tanh(scores_MN * (score_scale / softcap))
    else:
        scores_MN *= score_scale * _LOG2_E
    if MASKED:
        index_N = tl.load(block_first + block_N, mask=live_N, other=0) + within_N
        seen_MN = live_N[None, :] & (index_N[None, :] <= row_index_M[:, None])
        if WINDOWED:
            seen_MN &= index_N[None, :] > row_index_M[:, None] - window
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))

    new_top_M = tl.maximum(top_M, tl.max(scores_MN, axis=1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    finite_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M) if MASKED else new_top_M
    weights_MN = tl.exp2(scores_MN - finite_M[:, None])
    decay_M = tl.exp2(top_M - finite_M)
    total_M = total_M * decay_M + tl.sum(weights_MN, axis=1)
    if FORMAT != PLAIN:
        weights_MN *= tl.load(v_scale + token_N, mask=live_N, other=0.0).to(tl.float32)[None, :] * CODE_UNIT
    v_ND = decode(_load_keys(v, v_token_stride, token_N, live_N, VALUE_DIM, PADDED_VALUE_DIM, MASKED), FORMAT,
                  q_MD.dtype)
    acc_MD = tl.dot(weights_MN.to(q_MD.dtype), v_ND, acc_MD * decay_M[:, None], input_precision=PRECISION)
    return acc_MD, total_M, new_top_M


@triton.jit(do_not_specialize=["lse_row_stride", "lse_head_stride", "k_scale_head_stride", "v_scale_head_stride",
                               "window"])
def paged_attention_kernel(
        q, q_row_stride, q_head_stride,
        k, k_head_stride, k_token_stride, k_scale, k_scale_head_stride,
        v, v_head_stride, v_token_stride, v_scale, v_scale_head_stride,
        row_index_T, block_first, block_length, block_offset, items_NF,
        o, o_row_stride, o_head_stride, lse, lse_row_stride, lse_head_stride,
        score_scale, softcap, window,
        GROUP: tl.constexpr, KEY_DIM: tl.constexpr, PADDED_KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
        PADDED_VALUE_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
        FORMAT: tl.constexpr, CODE_UNIT: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAPPED: tl.constexpr,
        CONTINUE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """One work item (axis 0) of one kv head (axis 1), written to (o, lse).

    With CONTINUE the softmax goes on from the (o, lse) found there, which is the same as merging: a normalized partial
    is an unfinished softmax whose weights add up to 1 and whose largest score is its lse.
    UPCAST computes in fp32 whatever the inputs: in Triton's interpreter a bf16 `tl.dot` multiplies bit patterns.
    """
    item = items_NF + tl.program_id(0) * _FIELDS
    kv_head = tl.program_id(1).to(tl.int64)
    row, rows, target = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    start, dense_start = tl.load(item + 3), tl.load(item + 4)
    dense_stop, stop = tl.load(item + 5), tl.load(item + 6)

    packed_M = tl.arange(0, TILE_ROWS)
    within_M = packed_M // GROUP
    head_M = kv_head * GROUP + packed_M % GROUP
    live_M = within_M < rows
    row_index_M = tl.load(row_index_T + row + within_M, mask=live_M, other=-1)
    key_dim_D = tl.arange(0, PADDED_KEY_DIM)
    q_M = q + (row + within_M).to(tl.int64) * q_row_stride + head_M * q_head_stride
    q_MD = tl.load(q_M[:, None] + key_dim_D[None, :], mask=live_M[:, None] & (key_dim_D < KEY_DIM)[None, :], other=0.0)
    if UPCAST:
        q_MD = q_MD.to(tl.float32)

    k += kv_head * k_head_stride
    v += kv_head * v_head_stride
    if FORMAT != PLAIN:
        k_scale += kv_head * k_scale_head_stride
        v_scale += kv_head * v_scale_head_stride

    value_dim_D = tl.arange(0, PADDED_VALUE_DIM)
    live_MD = live_M[:, None] & (value_dim_D < VALUE_DIM)[None, :]
    target_M = (target + within_M).to(tl.int64)
    at_M = lse + target_M * lse_row_stride + head_M * lse_head_stride
    at_MD = o + (target_M * o_row_stride + head_M * o_head_stride)[:, None] + value_dim_D[None, :]
    if CONTINUE:
        top_M = tl.load(at_M, mask=live_M, other=float("-inf")) * _LOG2_E
        total_M = tl.where(top_M == float("-inf"), 0.0, 1.0)
        acc_MD = tl.load(at_MD, mask=live_MD, other=0.0) * CODE_UNIT
    else:
        top_M = tl.full([TILE_ROWS], float("-inf"), dtype=tl.float32)
        total_M = tl.zeros([TILE_ROWS], dtype=tl.float32)
        acc_MD = tl.zeros([TILE_ROWS, PADDED_VALUE_DIM], dtype=tl.float32)

    key_N = tl.arange(0, TILE_KEYS)
    # The dense part first: every row sees every key. What does not fill a tile joins the right edge.
    dense_tiles = (dense_stop - dense_start) // TILE_KEYS
    right_start = dense_start + dense_tiles * TILE_KEYS
    for tile in range(dense_tiles):
        acc_MD, total_M, top_M = _fold_keys(
            acc_MD, total_M, top_M, q_MD, row_index_M, dense_start + tile * TILE_KEYS + key_N, right_start,
            k, k_token_stride, k_scale, v, v_token_stride, v_scale, block_first, block_length, block_offset,
            score_scale, softcap, window, KEY_DIM, PADDED_KEY_DIM, VALUE_DIM, PADDED_VALUE_DIM, BLOCK_SIZE, FORMAT,
            CODE_UNIT, False, WINDOWED, SOFTCAPPED, PRECISION)
    left_tiles = tl.cdiv(dense_start - start, TILE_KEYS)
    for tile in range(left_tiles + tl.cdiv(stop - right_start, TILE_KEYS)):
        is_left = tile < left_tiles
        position = tl.where(is_left, start + tile * TILE_KEYS, right_start + (tile - left_tiles) * TILE_KEYS)
        acc_MD, total_M, top_M = _fold_keys(
            acc_MD, total_M, top_M, q_MD, row_index_M, position + key_N, tl.where(is_left, dense_start, stop),
            k, k_token_stride, k_scale, v, v_token_stride, v_scale, block_first, block_length, block_offset,
            score_scale, softcap, window, KEY_DIM, PADDED_KEY_DIM, VALUE_DIM, PADDED_VALUE_DIM, BLOCK_SIZE, FORMAT,
            CODE_UNIT, True, WINDOWED, SOFTCAPPED, PRECISION)

    # A total of 0 is a row that sees nothing: o is 0, and top = -inf makes lse -inf. A NaN is no 0 and stays one.
    divisor_M = tl.where(total_M == 0.0, 1.0, total_M)
    tl.store(at_MD, acc_MD / (divisor_M * CODE_UNIT)[:, None], mask=live_MD)
    tl.store(at_M, (top_M + tl.log2(divisor_M)) * _LN_2, mask=live_M)
