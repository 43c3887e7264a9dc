"""Packed linear layers: the same numbers, where they are worth their memory, and said."""

import pytest
import torch
from torch import nn

from ringserve.model import linear
from ringserve.model.linear import PackedLinear, linear_size, pack_linears

GIB = 1 << 30


def make_model(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.SiLU(), nn.Sequential(nn.Linear(80, 33, bias=bias)))
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
def test_packed_layers_give_the_same_numbers(rows: int, bias: bool) -> None:
    model, plain = make_model(bias=bias), make_model(bias=bias)
    assert pack_linears(model, GIB, 1).startswith("packed for this CPU")
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 2
    x = torch.randn(1, rows, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = model(x).double(), plain(x).double()
    exact = plain.double()(x.double())
    error, own = (float((y - exact).norm() / exact.norm()) for y in (ours, theirs))
    assert error <= 1.1 * own + 1e-6
    assert ours.shape == theirs.shape == (1, rows, 33)


def test_weights_can_still_be_looked_at_and_counted() -> None:
    model, plain = make_model(), make_model()
    size = linear_size(model)
    pack_linears(model, GIB, 1)
    assert linear_size(model) == size == 48 * 80 + 80 * 33
    assert torch.equal(model[0].weight, plain[0].weight)


def test_nothing_is_packed_where_it_does_not_pay() -> None:
    for model, free, ranks, reason in (
            (make_model(torch.float32), GIB, 1, "bfloat16 on CPUs"),
            (make_model(), 13_000 * 5, 2, "more than 20% of free memory")):
        assert reason in pack_linears(model, free, ranks)
        assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_other_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(linear.PackedLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    assert "gave other numbers" in pack_linears(model, GIB, 1)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
