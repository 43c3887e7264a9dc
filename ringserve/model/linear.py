"""Linear layers on CPUs: weights laid out once, at load, as oneDNN's product reads them, instead of at each call.

The same product and the same bits; for the few rows of a decode step it takes about half the time
(docs/performance.md). It costs memory: weights as they are in the checkpoint are pages that all ranks of a host share,
packed ones are each rank's own.
"""

import torch
from torch import Tensor, nn

SHARE = 0.2
"""Of the free memory that packed weights may take, all ranks of the host together."""
CHECKED_ROWS = (1, 3)


class PackedLinear(nn.Module):
    """A bf16 `nn.Linear` on a CPU, packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data)

    @property
    def weight(self) -> Tensor:
        """As it was: for who looks at it, not for products."""
        dense: Tensor = self._packed.to_dense()
        return dense

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


ONCE_A_STEP = ("embed", "lm_head")
"""Names of what is looked up, or multiplies only the rows that are sampled from."""


def linear_size(model: nn.Module) -> int:
    """Weights that multiply each token, packed or not."""
    sizes = [(name, m.in_features * m.out_features) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    sizes += [(name, p.numel()) for name, p in model.named_parameters() if p.dim() > 1]
    return sum(size for name, size in sizes if not any(part in name for part in ONCE_A_STEP))


def pack_linears(model: nn.Module, free: int, ranks: int) -> str:
    """Pack what can be packed if all `ranks` of this host may, with so many bytes free. Says what was done, and why
    not."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is nn.Linear and child.weight.device.type == "cpu"
             and child.weight.dtype == torch.bfloat16]
    size = sum(child.weight.nbytes for _, _, child in found)
    if not found:
        return "as torch computes them (packing is for bfloat16 on CPUs)"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "as torch computes them (this torch has no oneDNN)"
    if size * ranks > SHARE * free:
        return (f"as torch computes them (packed weights would take {size * ranks / 2**30:.2f} GiB, more than "
                f"{SHARE:.0%} of free memory)")
    for parent, name, child in found:
        packed = PackedLinear(child)
        if not _same(child, packed):
            return "as torch computes them (packed ones gave other numbers here)"
        setattr(parent, name, packed)
    return f"packed for this CPU ({size / 2**20:,.0f} MiB of each rank's own)"


def _same(linear: nn.Linear, packed: PackedLinear) -> bool:
    """To the rounding of bf16, for few rows."""
    for rows in CHECKED_ROWS:
        x = torch.linspace(-1, 1, rows * linear.in_features).view(1, rows, -1).to(linear.weight.dtype)
        ours, theirs = packed(x).float(), linear(x).float()
        if not torch.allclose(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max())):
            return False
    return True
