"""Gathering blocks of a paged cache into a contiguous buffer, for operations that read no block table.

Shape suffixes: K kv heads, P tokens of the storage, S tokens of the buffer, D head dim, B blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringserve_kernels.errors import ShapeError
from ringserve_kernels.triton.arguments import check_device, check_rows_contiguous, check_tensor
from ringserve_kernels.triton.launch import Launch
from ringserve_kernels.triton.table import BLOCK_SIZES


@triton.jit
def gather_kernel(storage, storage_head_stride, storage_token_stride, offset_B, length_B,
                  buffer, buffer_head_stride, buffer_token_stride,
                  DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """One block (axis 0) of one kv head (axis 1)."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token_S = tl.arange(0, BLOCK_SIZE)
    dim_D = tl.arange(0, PADDED_DIM)
    real_SD = (dim_D < DIM)[None, :]
    from_S = (tl.load(offset_B + block).to(tl.int64) + token_S) * storage_token_stride
    to_S = (block * BLOCK_SIZE + token_S) * buffer_token_stride
    live_SD = (token_S < tl.load(length_B + block))[:, None] & real_SD
    values_SD = tl.load(storage + head * storage_head_stride + from_S[:, None] + dim_D[None, :], mask=live_SD, other=0)
    tl.store(buffer + head * buffer_head_stride + to_S[:, None] + dim_D[None, :], values_SD, mask=real_SD)


def triton_gather(storage_KPD: Tensor, offset_B: Tensor, length_B: Tensor, block_size: int,
                  out: Tensor | None = None) -> Tensor:
    """Blocks of the storage, one after the other: [K, B * block_size, D], of the storage's dtype.

    Block b is `length_B[b]` tokens from `offset_B[b]` on (int32, on the device: those of a `PagedTable` fit); the
    rest of its `block_size` places is 0, whatever the free slots hold. Equivalent to index_select of the blocks'
    tokens. `out` may give the buffer. Any dtype of 1, 2 or 4 bytes. Raises an ArgumentError that names what does
    not fit.
    """
    heads, _, dim = storage_KPD.shape
    blocks = len(offset_B)
    device = storage_KPD.device
    check_device("storage_KPD", storage_KPD)
    check_tensor("offset_B", offset_B, (None,), [torch.int32], device)
    check_tensor("length_B", length_B, (blocks,), [torch.int32], device)
    check_rows_contiguous("storage_KPD", storage_KPD)
    if block_size not in BLOCK_SIZES:
        raise ShapeError("block_size", block_size, BLOCK_SIZES)
    buffer = storage_KPD.new_empty(heads, blocks * block_size, dim) if out is None else out
    check_tensor("out", buffer, (heads, blocks * block_size, dim), [storage_KPD.dtype], device)
    check_rows_contiguous("out", buffer)
    if buffer.numel() == 0:
        return buffer
    gather_launch(storage_KPD, offset_B, length_B, block_size, buffer).run()
    return buffer


def gather_launch(storage_KPD: Tensor, offset_B: Tensor, length_B: Tensor, block_size: int, buffer: Tensor) -> Launch:
    """`triton_gather`, not started, arguments not checked."""
    heads, _, dim = storage_KPD.shape
    # Bits are moved, not numbers: integers of the same size, because not every architecture has every fp8 type.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[storage_KPD.element_size()]
    source, target = storage_KPD.view(bits), buffer.view(bits)
    return Launch(
        gather_kernel, (len(offset_B), heads),
        (source, *source.stride()[:2], offset_B, length_B, target, *target.stride()[:2]),
        {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK_SIZE": block_size},
        num_warps=4 if block_size * dim <= 8192 else 8)
