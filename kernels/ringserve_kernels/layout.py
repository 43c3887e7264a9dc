"""Layout: how the keys of a storage lie, and what computes attention over them there.

    TileLayout     token after token; torch's operations on tiles
    NativeLayout   blocks as the C++ kernel reads them (CPU)
    PagedLayout    token after token; Triton's kernels on blocks, another operation on long runs (GPU)

Shape suffixes: T rows or tokens written, H query heads, K kv heads, P tokens of the storage, D head dim.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan
from ringserve_kernels.merge import State
from ringserve_kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from ringserve_kernels.key_values import KeyValues


class Layout(Protocol):
    @property
    def name(self) -> str:
        """Of what computes."""
        ...

    @property
    def order(self) -> str:
        """Of the keys: ranks whose layouts have the same one may exchange keys as they lie."""
        ...

    @property
    def granule(self) -> int:
        """Tokens that must stay together when they are copied."""
        ...

    def check_storage(self, name: str, x_KPD: Tensor) -> None:
        """Raises ArgumentError unless this can be a storage that lies so."""
        ...

    def attend(self, q_THD: Tensor, keys: "KeyValues", plan: AttentionPlan, spec: AttentionSpec,
               state: State) -> None:
        """Attention of the plan's rows, merged into the accumulators. The arguments were checked by `attend`; raises
        ArgumentError for what only this layout cannot take."""
        ...

    def write(self, x_KTD: Tensor, into_KPD: Tensor, where_T: Tensor, is_value: bool) -> None:
        """Write tokens at these offsets of a storage, in its dtype."""
        ...
