"""Quantized keys and values: int8 or fp8 (e4m3) codes with one scale per (token, head).

Shape suffixes: T new tokens, K kv heads, P tokens of the storage, D head dim. In kernels: N tokens, D head dim padded
to a power of two. A value is `code * scale`; the scale is the largest magnitude of a token's head over the largest
code, so that every code is used and nothing is clipped.

fp8 is written by arithmetic on bits, the same on every architecture and in Triton's interpreter. It is read by the
hardware's conversion where there is one (compute capability 8.9 and later), else by bits too: sm_80 has none.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringserve_kernels.errors import StrideError
from ringserve_kernels.quantize import LARGEST
from ringserve_kernels.triton.arguments import check_device, check_rows_contiguous, check_tensor
from ringserve_kernels.triton.launch import Launch

PLAIN = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8_BY_BITS = tl.constexpr(2)
FP8_IN_HARDWARE = tl.constexpr(3)

SCALE_DTYPES = (torch.float32, torch.float16)
WRITTEN_TOKENS = 16
"""Tokens of one program of the writing kernel."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Keys or values of a cache, as codes."""

    codes_KPD: Tensor
    """int8 or float8_e4m3fn [K, P, D]."""
    scale_KP: Tensor
    """fp32 or fp16 [K, P]."""

    def dequantized(self) -> Tensor:
        """fp32 [K, P, D], by plain torch: for tests and comparisons."""
        return self.codes_KPD.float() * self.scale_KP.float()[:, :, None]


@triton.jit
def decode(codes, FORMAT: tl.constexpr, TO: tl.constexpr):
    """Values of the codes, before their scale, exactly. fp8 codes come as bytes (uint8); 0x7F, e4m3's NaN, is never
    written and is not looked for."""
    if FORMAT == FP8_IN_HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(TO)
    if FORMAT == FP8_BY_BITS:
        # Sign, exponent and mantissa moved into the places of an fp16, whose exponent bias is larger by 8.
        # Subnormal codes become subnormal fp16, so the product is exact for all.
        bits = codes.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (half.to(tl.float16, bitcast=True) * 256.0).to(TO)
    return codes.to(TO)


@triton.jit
def encode_int8(x):
    """Nearest integer, ties to even: adding 1.5 * 2**23 leaves no bits for a fraction."""
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def encode_fp8(x):
    """The byte of the nearest e4m3 number, ties to even, for |x| <= 448."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Drop 20 of 23 mantissa bits, rounding to even; then the exponent bias is 7 instead of 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes count units of 2**-9, which is the spacing of fp32 numbers from 2**14 on.
    tiny = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    return (((bits >> 24) & 0x80) | tl.where(tl.abs(x) < 0.015625, tiny, normal)).to(tl.uint8)


@triton.jit(do_not_specialize=["tokens"])
def quantize_kernel(x, x_token_stride, x_head_stride, slot_T, codes, codes_head_stride, codes_token_stride,
                    scale, scale_head_stride, tokens,
                    LARGEST: tl.constexpr, IS_INT8: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
                    TOKENS: tl.constexpr):
    token_N = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    live_N = token_N < tokens
    dim_D = tl.arange(0, PADDED_DIM)
    live_ND = live_N[:, None] & (dim_D < DIM)[None, :]
    x_ND = tl.load(x + head * x_head_stride + (token_N.to(tl.int64) * x_token_stride)[:, None] + dim_D[None, :],
                   mask=live_ND, other=0.0).to(tl.float32)
    scale_N = tl.max(tl.abs(x_ND), axis=1) / LARGEST
    # A NaN has no code: it goes into the scale, so that attention shows it instead of a plausible number.
    broken_N = tl.max((x_ND != x_ND).to(tl.int32), axis=1) > 0
    x_ND = tl.where(x_ND == x_ND, x_ND, 0.0)
    scale_N = tl.where(broken_N, float("nan"), scale_N).to(scale.dtype.element_ty)
    # The codes are those of the scale as it is stored. An fp16 scale may be rounded down: then the largest code is
    # met by clamping, off by at most 2**-11 of it.
    stored_N = scale_N.to(tl.float32)
    divisor_N = tl.where(stored_N > 0.0, stored_N, float("inf"))
    scaled_ND = tl.div_rn(x_ND, divisor_N[:, None])
    scaled_ND = tl.minimum(tl.maximum(scaled_ND, -LARGEST), LARGEST)
    slot_N = tl.load(slot_T + token_N, mask=live_N, other=0).to(tl.int64)
    at_ND = codes + head * codes_head_stride + (slot_N * codes_token_stride)[:, None] + dim_D[None, :]
    if IS_INT8:
        tl.store(at_ND, encode_int8(scaled_ND), mask=live_ND)
    else:
        tl.store(at_ND, encode_fp8(scaled_ND), mask=live_ND)
    tl.store(scale + head * scale_head_stride + slot_N, scale_N, mask=live_N)


def quantize_write(x_TKD: Tensor, slot_T: Tensor, into: Quantized) -> None:
    """Quantize new keys or values and write them into the cache: token t at offset `slot_T[t]` of the storage.

    `x_TKD` is fp32, fp16 or bf16; `slot_T` is int32 or int64, distinct, each in [0, P): a kernel cannot check that
    without waiting for the device. Rounds to nearest, ties to even. A head that is all zeros gets scale 0; one with
    a NaN gets scale NaN. Error on Gaussian data: at most half a code, 1/254 of a head's largest magnitude (int8),
    or 1/16 of each value (fp8). Raises an ArgumentError that names what does not fit.
    """
    tokens, heads, dim = x_TKD.shape
    check_device("x_TKD", x_TKD)
    check_tensor("x_TKD", x_TKD, (None, None, None), [torch.float32, torch.float16, torch.bfloat16], x_TKD.device)
    check_tensor("slot_T", slot_T, (tokens,), [torch.int32, torch.int64], x_TKD.device)
    check_rows_contiguous("x_TKD", x_TKD)
    check_rows_contiguous("slot_T", slot_T)
    check_quantized("into", into, heads, dim, x_TKD.device)
    if tokens == 0:
        return
    quantize_launch(x_TKD, slot_T, into).run()


def quantize_launch(x_TKD: Tensor, slot_T: Tensor, into: Quantized) -> Launch:
    """`quantize_write`, not started, arguments not checked."""
    tokens, heads, dim = x_TKD.shape
    codes, dtype = code_bytes(into), into.codes_KPD.dtype
    return Launch(
        quantize_kernel, (triton.cdiv(tokens, WRITTEN_TOKENS), heads),
        (x_TKD, *x_TKD.stride()[:2], slot_T, codes, *codes.stride()[:2], into.scale_KP, into.scale_KP.stride(0),
         tokens),
        {"LARGEST": LARGEST[dtype], "IS_INT8": dtype == torch.int8, "DIM": dim,
         "PADDED_DIM": triton.next_power_of_2(dim), "TOKENS": WRITTEN_TOKENS})


def check_quantized(name: str, cache: Quantized, heads: int, dim: int, device: torch.device) -> None:
    """Raise an ArgumentError unless this is a quantized cache of these heads and this head dim."""
    check_tensor(f"{name}.codes_KPD", cache.codes_KPD, (heads, None, dim), list(LARGEST), device)
    check_tensor(f"{name}.scale_KP", cache.scale_KP, (heads, cache.codes_KPD.shape[1]), SCALE_DTYPES, device)
    check_rows_contiguous(f"{name}.codes_KPD", cache.codes_KPD)
    if cache.scale_KP.stride(1) != 1:
        raise StrideError(f"{name}.scale_KP", f"strided by {cache.scale_KP.stride()}", "stride 1 on the last axis")


def code_bytes(cache: Quantized) -> Tensor:
    """The codes as the kernels take them: fp8 as bytes, because not every architecture has the type."""
    codes = cache.codes_KPD
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
