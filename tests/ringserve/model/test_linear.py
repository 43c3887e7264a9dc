"""Packed linear layers: the same numbers, where they are worth their memory, and said."""

import pytest
import torch
from torch import Tensor, nn

from ringserve.model import linear
from ringserve.model.linear import PackedLinear, linear_size, pack_linears

GIB = 1 << 30


class Block(nn.Module):
    """Two layers that are given the same tensor, one that is given what they make."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(48, 80, bias=bias), nn.Linear(48, 80, bias=bias),
                                         nn.Linear(80, 48, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.blocks, self.lm_head = nn.Sequential(Block(bias), Block(bias)), nn.Linear(48, 33, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.blocks(x))
        return y


def make_model(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Model:
    torch.manual_seed(0)
    return Model(bias).to(dtype).requires_grad_(False)


def pack(model: nn.Module, free: int = GIB, ranks: int = 1) -> str:
    return pack_linears(model, lambda: model(numbers(1).to(model.lm_head.weight.dtype)), free, ranks)


def numbers(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(seed)).bfloat16()


def count(model: nn.Module) -> int:
    return sum(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_packed_layers_give_the_same_numbers(rows: int, bias: bool) -> None:
    model, plain = make_model(bias=bias), make_model(bias=bias)
    assert pack(model).startswith("packed for this CPU")
    assert count(model) == 7
    exact_model = make_model(bias=bias).double()
    for seed in (1, 2):  # what was left of one call is nothing to the next
        x = numbers(rows, seed)
        ours, theirs, exact = model(x).double(), plain(x).double(), exact_model(x.double())
        error, own = (float((y - exact).norm() / exact.norm()) for y in (ours, theirs))
        assert error <= 1.1 * own + 1e-6
        assert ours.shape == theirs.shape == (1, rows, 33)


def test_layers_that_are_given_the_same_tensor_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    pack(model)
    calls = []
    multiply = linear.SharedProduct._multiply
    monkeypatch.setattr(linear.SharedProduct, "_multiply", lambda self, x: calls.append(1) or multiply(self, x))
    model(numbers(2))
    assert len(calls) == 5  # of seven layers


def test_a_layer_that_is_asked_by_itself_answers_for_the_tensor_it_is_given() -> None:
    model, plain = make_model(), make_model()
    pack(model)
    ours, theirs = model.blocks[0], plain.blocks[0]
    x, other = numbers(3), numbers(3, seed=2)
    assert torch.equal(ours.gate(x), theirs.gate(x))
    assert torch.equal(ours.up(other), theirs.up(other))  # not the part that x left
    assert torch.equal(ours.up(other), theirs.up(other))  # again
    ours.gate(x)
    x.neg_()
    assert torch.equal(ours.up(x), theirs.up(x))  # the same tensor, but not the same numbers


def test_weights_can_still_be_looked_at_and_counted() -> None:
    model, plain = make_model(), make_model()
    size = linear_size(model)
    pack(model)
    assert linear_size(model) == size == 2 * 3 * 48 * 80
    for name in ("gate", "up", "down"):
        assert torch.equal(getattr(model.blocks[1], name).weight, getattr(plain.blocks[1], name).weight)


def test_nothing_is_packed_where_it_does_not_pay() -> None:
    for model, free, ranks, reason in (
            (make_model(torch.float32), GIB, 1, "bfloat16 on CPUs"),
            (make_model(), 24_624 * 2 * 5 - 1, 1, "more than 20% of free memory")):
        assert reason in pack(model, free, ranks)
        assert not count(model)


def test_other_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(linear.PackedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    assert "gave other numbers" in pack(model)
    assert not count(model)
