"""What the Triton kernels accept: checks that raise the errors of `ringserve_kernels.errors`."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction

from ringserve_kernels.errors import DeviceError, DtypeError, ShapeError, StrideError

INTERPRETED = not isinstance(tl.sigmoid, JITFunction)
"""Kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 when triton was imported)."""


def check_device(name: str, tensor: Tensor) -> None:
    """Raise DeviceError unless kernels of this process run where the tensor lies."""
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise DeviceError(name, f"on {tensor.device}",
                          "the CPU (Triton interprets kernels in this process)" if INTERPRETED else
                          "a CUDA device, or the CPU with TRITON_INTERPRET=1 set before triton is imported")


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype],
                 device: torch.device) -> None:
    """Raise the ArgumentError that says how this tensor differs from (shape, one of dtypes, device). None in a
    shape is any size."""
    if tensor.device != device:
        raise DeviceError(name, f"on {tensor.device}", device)
    if tensor.dtype not in dtypes:
        raise DtypeError(name, tensor.dtype, ", ".join(map(str, dtypes)))
    if tensor.dim() != len(shape) or any(want not in (None, got) for got, want in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ShapeError(name, f"of shape {tuple(tensor.shape)}", f"({wanted})")


def check_rows_contiguous(name: str, tensor: Tensor) -> None:
    """Raise StrideError unless the elements of the last axis are adjacent."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise StrideError(name, f"strided by {tuple(tensor.stride())}", "stride 1 on the last axis")
