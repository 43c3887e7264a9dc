"""`triton_merge` is `merge_attention_states`, in one kernel."""

import pytest
import torch
from ringserve_kernels import merge_attention_states, new_state
from ringserve_kernels.triton import triton_merge
from torch import Tensor

from tests.kernels.shards import State
from tests.kernels.triton.paged import DEVICE

ROWS, HEADS = 37, 3


def partial(dim: int, seed: int, dtype: torch.dtype = torch.float32, blind: float = 0.2) -> State:
    """Random, with rows that have seen nothing, head-major like accumulators."""
    generator = torch.Generator().manual_seed(seed)
    o, lse = new_state(ROWS, HEADS, dim, torch.float32, torch.device("cpu"))
    o.copy_(torch.randn(o.shape, generator=generator))
    lse.copy_(torch.randn(lse.shape, generator=generator) * 20)
    nothing = torch.rand(lse.shape, generator=generator) < blind
    o[nothing], lse[nothing] = 0.0, -torch.inf
    return o.to(dtype).to(DEVICE), lse.to(DEVICE)


def copy(state: State) -> State:
    return state[0].clone(), state[1].clone()


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_gives_what_plain_torch_gives(dim: int, dtype: torch.dtype) -> None:
    state, other = partial(dim, 1), partial(dim, 2, dtype)
    expected = copy(state)
    merge_attention_states(*expected, *other)
    triton_merge(*state, *other)
    torch.testing.assert_close(state[0], expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state[1], expected[1], rtol=1e-6, atol=1e-6)


def test_identities_change_nothing() -> None:
    state, nothing = partial(32, 3), new_state(ROWS, HEADS, 32, torch.float32, DEVICE)
    expected = copy(state)
    triton_merge(*state, *nothing)
    assert torch.equal(state[0], expected[0]) and torch.equal(state[1], expected[1])
    triton_merge(*nothing, *state)
    assert torch.equal(nothing[0], expected[0]) and torch.equal(nothing[1], expected[1])


def test_values_that_agree_are_kept() -> None:
    state, other = partial(32, 4, blind=0.0), partial(32, 5, blind=0.0)
    state[0].fill_(1.0)
    other[0].fill_(1.0)
    triton_merge(*state, *other)
    assert torch.all(state[0] == 1.0)


def test_a_nan_stays_one() -> None:
    state, other = partial(32, 6), partial(32, 7)
    state[1][0, 0] = torch.nan
    triton_merge(*state, *other)
    assert state[1][0, 0].isnan() and state[0][0, 0].isnan().all()


def test_nothing_to_merge() -> None:
    state: tuple[Tensor, Tensor] = new_state(0, HEADS, 32, torch.float32, DEVICE)
    triton_merge(*state, *copy(state))
