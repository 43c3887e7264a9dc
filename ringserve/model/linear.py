"""Linear layers on CPUs: weights laid out once, at load, as oneDNN's product reads them, instead of at each call.
Layers that are given the same tensor (queries, keys and values; gate and up) are one product.

The same product and the same bits; for the few rows of a decode step it takes about half the time
(docs/performance.md). It costs memory: weights as they are in the checkpoint are pages that all ranks of a host share,
packed ones are each rank's own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SHARE = 0.2
"""Of the free memory that packed weights may take, all ranks of the host together."""
CHECKED_ROWS = (1, 3)


class SharedProduct:
    """One product for all linear layers that are given the same tensor: the first that asks computes it, the others
    take their parts."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._sizes = [linear.out_features for linear in linears]
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([linear.weight.data for linear in linears]))
        self._x: Tensor | None = None
        self._version = 0
        self._left: dict[int, Tensor] = {}
        """Parts that have not been taken."""

    def part(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` makes of x: [..., in] -> [..., out], the last dimension adjacent."""
        if len(self._sizes) == 1:
            return self._multiply(x)
        if x is not self._x or x._version != self._version or index not in self._left:
            self._x, self._version = x, x._version
            self._left = dict(enumerate(self._multiply(x).split_with_sizes(self._sizes, -1)))
        y = self._left.pop(index)
        if not self._left:
            self._x = None  # a chunk's activations are not kept
        return y

    def weight(self, index: int) -> Tensor:
        """As it was: for who looks at it, not for products."""
        start = sum(self._sizes[:index])
        dense: Tensor = self._packed.to_dense()
        return dense[start:start + self._sizes[index]]

    def _multiply(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


class PackedLinear(nn.Module):
    """A bf16 `nn.Linear` on a CPU: layer `index` of a product."""

    def __init__(self, linear: nn.Linear, product: SharedProduct, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._product, self._index = product, index

    @property
    def weight(self) -> Tensor:
        return self._product.weight(self._index)

    def forward(self, x: Tensor) -> Tensor:
        return self._product.part(self._index, x)


ONCE_A_STEP = ("embed", "lm_head")
"""Names of what is looked up, or multiplies only the rows that are sampled from."""


def linear_size(model: nn.Module) -> int:
    """Weights that multiply each token, packed or not."""
    sizes = [(name, m.in_features * m.out_features) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    sizes += [(name, p.numel()) for name, p in model.named_parameters() if p.dim() > 1]
    return sum(size for name, size in sizes if not any(part in name for part in ONCE_A_STEP))


def pack_linears(model: nn.Module, run: Callable[[], object], free: int, ranks: int) -> str:
    """Pack what can be packed if all `ranks` of this host may, with so many bytes free. Says what was done, and why
    not. `run` runs the model once, to see which layers are given the same tensor."""
    found = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()
             if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.bfloat16}
    size = sum(linear.weight.nbytes for linear in found)
    if not found:
        return "as torch computes them (packing is for bfloat16 on CPUs)"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "as torch computes them (this torch has no oneDNN)"
    if size * ranks > SHARE * free:
        return (f"as torch computes them (packed weights would take {size * ranks / 2**30:.2f} GiB, more than "
                f"{SHARE:.0%} of free memory)")
    instead: dict[nn.Linear, PackedLinear] = {}
    for group in _groups(found, run):
        product = SharedProduct(group)
        packed = [PackedLinear(linear, product, i) for i, linear in enumerate(group)]
        if not _same(group, packed):
            return "as torch computes them (packed ones gave other numbers here)"
        instead.update(zip(group, packed))
    for linear, (parent, name) in found.items():
        setattr(parent, name, instead[linear])
    return f"packed for this CPU ({size / 2**20:,.0f} MiB of each rank's own)"


def _groups(found: dict[nn.Linear, tuple[nn.Module, str]], run: Callable[[], object]) -> list[list[nn.Linear]]:
    """All of them, those of one parent that were given the same tensor together."""
    given: list[tuple[nn.Linear, Tensor]] = []
    hooks = [linear.register_forward_pre_hook(lambda module, args: given.append((module, args[0]))) for linear in found]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[object, ...], list[nn.Linear]] = {}
    seen: set[nn.Linear] = set()
    for linear, x in given:  # `given` keeps the tensors, so no other has the id of one of them
        if linear not in seen:
            seen.add(linear)
            groups.setdefault((found[linear][0], id(x), linear.bias is None), []).append(linear)
    return [*groups.values(), *([linear] for linear in found if linear not in seen)]


def _same(linears: Sequence[nn.Linear], packed: Sequence[PackedLinear]) -> bool:
    """To the rounding of bf16, for few rows."""
    for rows in CHECKED_ROWS:
        x = torch.linspace(-1, 1, rows * linears[0].in_features).view(1, rows, -1).to(linears[0].weight.dtype)
        for linear, other in zip(linears, packed):
            ours, theirs = other(x).float(), linear(x).float()
            if not torch.allclose(ours, theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max())):
                return False
    return True
