"""What the kernels accept, and errors that name the argument and say what is allowed.

    ValueError
    └── ArgumentError
        ├── ShapeError      sizes that do not belong together
        ├── DtypeError
        ├── StrideError     a layout that the kernels do not read
        └── DeviceError     tensors on different devices, or where no kernel can run
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction


class ArgumentError(ValueError):
    """An argument that no kernel takes: `argument` is its name."""

    def __init__(self, argument: str, got: object, allowed: object) -> None:
        super().__init__(f"{argument} is {got}; allowed: {allowed}")
        self.argument = argument


class ShapeError(ArgumentError):
    """Sizes that do not belong together, or that no kernel has been built for."""


class DtypeError(ArgumentError):
    """A dtype that no kernel reads or writes."""


class StrideError(ArgumentError):
    """A layout that the kernels do not read: the last axis must be contiguous."""


class DeviceError(ArgumentError):
    """A tensor on another device than the others, or where no kernel can run."""


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
