"""Quantized keys and values: eight bits a number and one scale per token and head.

int8: 127 steps to the largest number of the token; fp8 e4m3: 448 is the largest. On Gaussian data the attention's
error is about 1% and 4% of its RMS (docs/performance.md).
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x_KTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes_KTD of `dtype`, scale_KT fp32): x is about codes * scale. What is not finite gives a scale that is not,
    so that it shows in every score."""
    x = x_KTD.float()
    scale = x.abs().amax(dim=-1) / LARGEST[dtype]
    steps = x / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    codes = steps.round().clamp(-127, 127) if dtype is torch.int8 else steps.clamp(-448, 448)
    return codes.to(dtype), scale


def dequantize(codes_KTD: Tensor, scale_KT: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_KTD.float() * scale_KT.unsqueeze(-1)).to(dtype)
