"""Wrong arguments are refused by name, with what is allowed; nothing is converted or copied silently."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ringserve_kernels import AttentionSpec, KeyBlocks, RowSpan
from ringserve_kernels.triton import (
    ArgumentError,
    DeviceError,
    DtypeError,
    Quantized,
    ShapeError,
    StrideError,
    page_table,
    quantize_write,
    triton_attend,
    triton_gather,
    triton_merge,
)

from tests.kernels.shards import make_spec
from tests.kernels.triton.paged import DEVICE

SPEC = make_spec(kv_heads=2, group=2, dim=32)
BLOCKS = KeyBlocks(np.array([0]), np.array([5]), np.array([16]))
SPAN = RowSpan(0, np.array([4]))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def attend(**changed: object) -> Callable[[], object]:
    table = page_table(1, [(SPAN, BLOCKS)], SPEC, 16, DEVICE)
    given = {"q_THD": tensor(1, 4, 32), "k": tensor(2, 64, 32), "v": tensor(2, 64, 32), "table": table, "spec": SPEC}
    return lambda: triton_attend(**{**given, **changed})  # type: ignore[arg-type]


def cache(codes: torch.dtype = torch.int8, scale: torch.dtype = torch.float32, tokens: int = 64) -> Quantized:
    return Quantized(tensor(2, 64, 32, dtype=codes), tensor(2, tokens, dtype=scale))


def table(**changed: object) -> Callable[[], object]:
    given = {"rows": 1, "sequences": [(SPAN, BLOCKS)], "spec": SPEC, "block_size": 16, "device": DEVICE}
    return lambda: page_table(**{**given, **changed})  # type: ignore[arg-type]


WRONG: list[tuple[Callable[[], object], type[ArgumentError], str]] = [
    (attend(q_THD=tensor(2, 4, 32)), ShapeError, "q_THD"),
    (attend(q_THD=tensor(1, 4, 32, dtype=torch.float64)), DtypeError, "q_THD"),
    (attend(q_THD=tensor(1, 32, 4).transpose(1, 2)), StrideError, "q_THD"),
    (attend(k=tensor(2, 64, 16)), ShapeError, "k"),
    (attend(k=tensor(2, 20, 32)), ShapeError, "k"),
    (attend(v=tensor(2, 64, 32, dtype=torch.float16)), DtypeError, "v"),
    (attend(v=tensor(2, 32, 64).transpose(1, 2)), StrideError, "v"),
    (attend(v=cache()), DtypeError, "v"),
    (attend(k=cache(), v=cache(torch.float8_e4m3fn)), DtypeError, "v"),
    (attend(k=cache(), v=cache(scale=torch.bfloat16)), DtypeError, "v.scale_KP"),
    (attend(k=cache(tokens=63), v=cache()), ShapeError, "k.scale_KP"),
    (attend(k=tensor(2, 64, 32, device=torch.device("meta"))), DeviceError, "k"),
    (attend(spec=make_spec(kv_heads=2, group=2, dim=32, window=5)), ShapeError, "table"),
    (attend(into=(tensor(1, 4, 32), tensor(1, 4, dtype=torch.float16))), DtypeError, "into[1]"),
    (attend(into=(tensor(1, 4, 16), tensor(1, 4))), ShapeError, "into[0]"),
    (table(block_size=48), ShapeError, "block_size"),
    (table(rows=0), ShapeError, "sequences"),
    (table(sequences=[(SPAN, BLOCKS), (SPAN, BLOCKS)]), ShapeError, "sequences"),
    (table(sequences=[(SPAN, KeyBlocks(np.array([0]), np.array([17]), np.array([0])))]), ShapeError, "sequences"),
    (table(sequences=[(SPAN, KeyBlocks(np.array([0]), np.array([16]), np.array([2**31])))]), ShapeError, "sequences"),
    (table(spec=make_spec(kv_heads=1, group=129)), ShapeError, "spec"),
    (table(spec=make_spec(kv_heads=1, group=65, dim=256)), ShapeError, "spec"),
    (lambda: triton_merge(tensor(1, 4, 32), tensor(1, 4), tensor(1, 4, 32), tensor(4, 1)), ShapeError, "other_lse_TH"),
    (lambda: triton_gather(tensor(2, 64, 32), tensor(3), tensor(3), 16), DtypeError, "offset_B"),
    (lambda: triton_gather(tensor(2, 64, 32), *(tensor(3, dtype=torch.int32),) * 2, 24), ShapeError, "block_size"),
    (lambda: quantize_write(tensor(3, 2, 32), tensor(2, dtype=torch.int64), cache()), ShapeError, "slot_T"),
    (lambda: quantize_write(tensor(3, 2, 32), tensor(3, dtype=torch.int64), cache(torch.uint8)), DtypeError,
     "into.codes_KPD"),
]


@pytest.mark.parametrize(("call", "error", "argument"), WRONG)
def test_it_is_refused_by_name(call: Callable[[], object], error: type[ArgumentError], argument: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument} is ") and "allowed: " in str(caught.value)


def test_dims_beyond_the_kernels_are_refused() -> None:
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, key_dim=512, value_dim=512, scale=1.0)
    with pytest.raises(ShapeError, match="at most 256"):
        triton_attend(tensor(1, 1, 512), tensor(1, 64, 512), tensor(1, 64, 512),
                      page_table(1, [(SPAN, BLOCKS)], spec, 16, DEVICE), spec)


def test_the_cpu_is_refused_where_kernels_are_compiled() -> None:
    """In a process of its own, because in this one they are interpreted."""
    code = """
import torch
from ringserve_kernels.errors import DeviceError
from ringserve_kernels.triton.arguments import check_device
try:
    check_device("q_THD", torch.zeros(1))
except DeviceError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("q_THD is on cpu; allowed: a CUDA device"), done
    assert "TRITON_INTERPRET=1" in done.stdout
