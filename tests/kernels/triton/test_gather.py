"""`triton_gather`: blocks one after the other, 0 where a block is not full, whatever lies in free slots."""

import pytest
import torch
from ringserve_kernels.triton import triton_gather

from tests.kernels.triton.paged import DEVICE


def storage(dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(2 * 256 * dim).view(2, 256, dim) % 251 - 120).float().to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("dim", "block"), [(64, 16), (80, 64)])
def test_it_gives_the_tokens_of_the_blocks(dim: int, block: int, dtype: torch.dtype) -> None:
    source = storage(dim, dtype)
    offset, length = [128, 0, 65, 190], [block, 3, block, 1]
    expected = torch.zeros(2, 4 * block, dim, dtype=dtype, device=DEVICE)
    for number, (at, size) in enumerate(zip(offset, length)):
        expected[:, number * block : number * block + size] = source[:, at : at + size]
    table = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (offset, length))
    actual = triton_gather(source, *table, block)
    assert actual.dtype == dtype
    assert torch.equal(actual.float(), expected.float())


def test_free_slots_do_not_leak() -> None:
    source = storage(32, torch.float32)
    source[:, 5:] = torch.nan
    offset, length = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (0, 5))
    out = torch.full((2, 16, 32), torch.nan, device=DEVICE)
    assert triton_gather(source, offset, length, 16, out=out) is out
    assert torch.equal(out[:, :5], source[:, :5]) and torch.all(out[:, 5:] == 0)


def test_no_blocks() -> None:
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert triton_gather(storage(32, torch.float32), none, none, 16).shape == (2, 0, 32)
