"""Launch: a kernel with everything it is started with. Kept apart from starting it, so that tests compile exactly what
the host would launch, for architectures that are not here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Launch:
    kernel: Any
    """A function under `triton.jit`."""
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float | None, ...]
    """In the order of the kernel's parameters."""
    constants: dict[str, object]
    """The kernel's compile-time parameters, by name."""
    num_warps: int = 4
    num_stages: int = 1
    """Loads of a loop in flight."""

    def run(self) -> None:
        """On the device of the first argument, a tensor. Returns at once."""
        with torch.cuda.device_of(self.arguments[0]):  # type: ignore[no-untyped-call]
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, object]:
        """For Triton's compiler. Fusing a product and a sum into one rounding is its default up to 3.9."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
