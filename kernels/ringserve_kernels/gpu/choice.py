"""What computes a layer's attention on a GPU: which dense operation stands beside Triton's kernels."""

import torch

from ringserve_kernels.choice import Against, Choice, Shapes, Wanted, torch_path, verify
from ringserve_kernels.errors import KernelUnavailable
from ringserve_kernels.gpu.dense import OPERATIONS, Capability
from ringserve_kernels.race import race
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile_layout import TILES

CHECKED: Shapes = ((37, 300), (130, 1500))
"""Rows that fill no tile; a past that is long enough for a dense operation."""
CHUNK = (2048, 32_768)
"""The race's shape: rows and keys of a chunk of a prompt. Few rows are Triton's in any case."""


def choose_on_gpu(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, block: int, wanted: Wanted,
                  quantized: bool = False, capability: Capability | None = None,
                  chunk: tuple[int, int] = CHUNK) -> Choice:
    """`capability`: the device's own if it is not given. Raises KernelUnavailable when what is wanted cannot be had."""
    if wanted == "native":
        raise KernelUnavailable("the native attention kernel is for CPUs, not GPUs")
    capability = capability or torch.cuda.get_device_capability(device)
    try:
        from ringserve_kernels.gpu.layout import PagedLayout
    except ImportError:
        return _by_torch(spec, dtype, device, wanted, "Triton is not installed (pip install 'ringserve[triton]')")
    against = Against()
    contenders: dict[str, PagedLayout] = {}
    for dense in (None, *OPERATIONS):
        name = "triton" if dense is None else dense.name
        if wanted not in ("auto", name):
            continue
        layout = PagedLayout(block, dense)
        reason = (PagedLayout.refusal(spec, dtype, block, dense is not None, quantized)
                  or (dense.missing(capability) if dense else None))
        try:
            if reason:
                raise KernelUnavailable(reason)
            verify(layout, spec, dtype, block, device, CHECKED)
        except KernelUnavailable as error:
            against.add(name, str(error))
            continue
        contenders[f"{name} {dense.version if dense else ''}"] = layout
    if not contenders:
        return _by_torch(spec, dtype, device, wanted, str(against))
    if wanted != "auto":
        return Choice(next(iter(contenders.values())), f"{wanted} (as asked for)")
    times = race(contenders, spec, dtype, block, device, (chunk,))
    best = min(contenders, key=lambda name: times[name][0])
    slower = [f"{times[name][0] / times[best][0]:.2g} times as fast as {layout.name}"
              for name, layout in contenders.items() if name != best]
    return Choice(contenders[best], f"{contenders[best].name} ({'; '.join([*slower, str(against)]).strip('; ')})")


def _by_torch(spec: AttentionSpec, dtype: torch.dtype, device: torch.device, wanted: Wanted, why: str) -> Choice:
    if wanted != "auto":
        raise KernelUnavailable(f"attention by {wanted} cannot be used: {why}")
    return Choice(TILES, f"{torch_path(spec, dtype, device)} (Triton's kernels not used: {why})")
