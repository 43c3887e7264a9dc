"""NativeLayout: keys and values in blocks as the native kernel reads and writes them.

Within a block of `block` tokens, per head: keys [key_dim / pack][block][pack], values [block / pack][value_dim][pack].
Only the kernel reads and writes them; whole blocks may be copied by anybody.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan
from ringserve_kernels.errors import DeviceError, DtypeError, ShapeError, StrideError
from ringserve_kernels.merge import State
from ringserve_kernels.native.library import NativeKernel
from ringserve_kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from ringserve_kernels.key_values import KeyValues

LANES = 16
"""Numbers of the widest vector: what a value and a block hold is a multiple of it."""
LARGEST_BLOCK = 256
"""A chunk of keys, of which scores are made at a time."""
PACK = {torch.float32: 1, torch.bfloat16: 2}
"""By the queries' dtype: steps of a product that lie side by side."""


@dataclass(frozen=True, slots=True)
class NativeLayout:
    kernel: NativeKernel
    block: int
    dtype: torch.dtype
    """Of the queries: fp32 or bf16."""

    @staticmethod
    def refusal(spec: AttentionSpec, dtype: torch.dtype, block: int) -> str | None:
        """What of this the kernel cannot take."""
        if dtype not in PACK:
            return f"it computes in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if spec.key_dim % PACK[dtype] or spec.value_dim % LANES:
            return (f"it needs even key dims and value dims that are multiples of {LANES}, not {spec.key_dim} and "
                    f"{spec.value_dim}")
        if block % LANES or block > LARGEST_BLOCK:
            return f"it needs blocks of a multiple of {LANES} tokens up to {LARGEST_BLOCK}, not {block}"
        if spec.scale <= 0:
            return f"it needs a positive scale, not {spec.scale:g}"
        return None

    @property
    def name(self) -> str:
        return f"native {self.kernel.name}"

    @property
    def order(self) -> str:
        return f"blocks of {self.block} by {PACK[self.dtype]}"

    @property
    def granule(self) -> int:
        return self.block

    def check_storage(self, name: str, x_KPD: Tensor) -> None:
        if x_KPD.device.type != "cpu":
            raise DeviceError(name, f"on {x_KPD.device}", "the CPU, in the native kernel's layout")
        if x_KPD.shape[1] % self.block:
            raise ShapeError(name, f"of {x_KPD.shape[1]} tokens", f"whole blocks of {self.block}")
        if x_KPD.stride()[1:] != (x_KPD.shape[2], 1):
            raise StrideError(name, f"strided by {x_KPD.stride()}", "the tokens of a head adjacent")

    def attend(self, q_THD: Tensor, keys: "KeyValues", plan: AttentionPlan, spec: AttentionSpec,
               state: State) -> None:
        if q_THD.dtype != self.dtype:
            raise DtypeError("q_THD", q_THD.dtype, f"{self.dtype}, for which the keys were laid out")
        self.kernel.attend(q_THD, keys.k_KPD, keys.v_KPD, keys.scales_KP, self.block, plan.table(self.block), spec,
                           *state)

    def write(self, x_KTD: Tensor, into_KPD: Tensor, where_T: Tensor, is_value: bool) -> None:
        """Raises ShapeError, and writes nothing, for an offset that is not in the storage."""
        bad = self.kernel.store(x_KTD, into_KPD, where_T, block=self.block, pack=PACK[self.dtype], is_value=is_value)
        if bad is not None:
            raise ShapeError("where_T", f"with offset {bad}", f"0 to {into_KPD.shape[1] - 1}")
