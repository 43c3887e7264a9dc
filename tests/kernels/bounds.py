"""How far a result may lie from the fp64 oracle, by relative RMS: never by the largest difference alone."""

import torch
from torch import Tensor

OUTPUT_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
LSE_BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-4}
"""Absolute, for |lse| up to 10. In bf16 the CPU op's exponential is good to about 6e-5."""
FEW_NUMBERS = 1024
"""Fewer bf16 numbers than this may by chance all be rounded badly: the bound is doubled."""


def relative_rms(value: Tensor, reference: Tensor) -> float:
    scale = reference.double().square().mean().sqrt().clamp(min=1e-30)
    return float((value.double() - reference.double()).square().mean().sqrt() / scale)


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """(o, lse) within the bounds for inputs of this dtype; rows that see nothing are exactly (0, -inf)."""
    (o, lse), (expected_o, expected_lse) = actual, expected
    assert o.shape == expected_o.shape and lse.shape == expected_lse.shape
    assert lse.dtype == o.dtype == torch.promote_types(dtype, torch.float32)
    blind = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind), "rows that see no key must have lse = -inf, and only they"
    assert torch.all(o[blind] == 0), "rows that see no key must have o = 0"
    if blind.all():
        return
    chance = 2 if dtype is torch.bfloat16 and o.numel() < FEW_NUMBERS else 1
    assert relative_rms(o, expected_o) <= chance * OUTPUT_BOUND[dtype]
    seen, reference = lse[~blind].double(), expected_lse[~blind]
    assert torch.all((seen - reference).abs() <= LSE_BOUND[dtype] * (reference.abs() / 10).clamp(min=1))
