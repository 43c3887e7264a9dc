"""Merging partials: the algebra, empty rows, extremes, and golden numbers that other conventions fail."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import merge_attention_states, merge_rows, merge_sink, new_state
from ringserve_kernels.tile import attend_tile
from torch import Tensor

from tests.kernels.shards import make_spec

INF = math.inf
QUICK = settings(max_examples=60, deadline=None)
ROWS, HEADS, DIM = 3, 2, 4

State = tuple[Tensor, Tensor]
lse_values = st.one_of(st.floats(-30, 30), st.just(-INF), st.sampled_from([-3e4, 3e4, 1e3, -150.0]))


@st.composite
def states(draw: st.DrawFn) -> State:
    """A partial under the contract: o is 0 where lse is -inf."""
    lse = torch.tensor(draw(st.lists(lse_values, min_size=ROWS * HEADS, max_size=ROWS * HEADS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    o = torch.randn(ROWS, HEADS, DIM, generator=generator) + 1.0
    lse_TH = lse.view(ROWS, HEADS)
    return o.masked_fill(lse_TH.isneginf()[..., None], 0.0), lse_TH


def merged(*parts: State) -> State:
    o_THD, lse_TH = parts[0][0].clone(), parts[0][1].clone()
    for part in parts[1:]:
        merge_attention_states(o_THD, lse_TH, *part)
    return o_THD, lse_TH


def formula(*parts: State) -> State:
    """One softmax over all parts, in fp64."""
    lse = torch.stack([part[1].double() for part in parts])
    whole = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - torch.where(whole.isneginf(), 0.0, whole))
    return sum(w[..., None] * part[0].double() for w, part in zip(weights, parts)), whole  # type: ignore[return-value]


def assert_same(a: State, b: State) -> None:
    """Up to rounding: an lse of 3e4 is only known to 2e-3, and so are the weights that it gives."""
    largest = float(b[1].masked_fill(b[1].isneginf(), 0.0).abs().max())
    weights = max(1e-5, 8 * largest * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(a[0].double(), b[0].double(), rtol=weights, atol=weights)
    torch.testing.assert_close(a[1].double(), b[1].double(), rtol=1e-6, atol=1e-5)


@QUICK
@given(st.lists(states(), min_size=1, max_size=6))
def test_merging_is_one_softmax_over_all_parts(parts: list[State]) -> None:
    assert_same(merged(*parts), formula(*parts))


@QUICK
@given(states(), states())
def test_merging_commutes(a: State, b: State) -> None:
    assert_same(merged(a, b), merged(b, a))


@QUICK
@given(states(), states(), states())
def test_merging_associates(a: State, b: State, c: State) -> None:
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


@QUICK
@given(states())
def test_the_identity_changes_nothing_from_either_side(a: State) -> None:
    identity = new_state(ROWS, HEADS, DIM, torch.float32, torch.device("cpu"))
    for result in (merged(a, identity), merged(identity, a)):
        assert torch.equal(result[0], a[0]) and torch.equal(result[1], a[1])


def test_two_identities_give_the_identity_and_not_nan() -> None:
    o_THD, lse_TH = new_state(1, 1, 2, torch.bfloat16, torch.device("cpu"))
    merge_attention_states(o_THD, lse_TH, o_THD.clone(), lse_TH.clone())
    assert o_THD.dtype == lse_TH.dtype == torch.float32
    assert o_THD.tolist() == [[[0.0, 0.0]]] and lse_TH.tolist() == [[-INF]]


@QUICK
@given(st.lists(st.one_of(st.floats(-3e4, 3e4), st.just(-INF)), min_size=1, max_size=20))
def test_values_that_agree_are_kept_exactly(lses: list[float]) -> None:
    o_THD, lse_TH = new_state(1, 1, DIM, torch.float32, torch.device("cpu"))
    for lse in lses:
        value = 0.0 if lse == -INF else 1.0
        merge_attention_states(o_THD, lse_TH, torch.full_like(o_THD, value), torch.full_like(lse_TH, lse))
    assert torch.all(o_THD == (0.0 if max(lses) == -INF else 1.0))


@pytest.mark.parametrize("gap", [100.0, 500.0, 6e4])
@pytest.mark.parametrize("top", [-3e4, 0.0, 3e4])
def test_far_apart_parts_leave_the_larger_one(gap: float, top: float) -> None:
    large = (torch.full((1, 1, 2), 7.0), torch.full((1, 1), top))
    small = (torch.full((1, 1, 2), -5.0), torch.full((1, 1), top - gap))
    for result in (merged(large, small), merged(small, large)):
        assert result[0].tolist() == [[[7.0, 7.0]]] and result[1].tolist() == [[top]]


@pytest.mark.parametrize(("lse", "other", "o", "whole"), [
    (0.0, 0.0, 2.0, 0.6931472),  # equal parts: the mean, ln 2; base 2 would say 1.0
    (math.log(3.0), 0.0, 1.5, 1.3862944),  # 3 keys against 1: (3*1 + 1*3) / 4, ln 4
    (1.0, 0.0, 1.5378828, 1.3132617),  # weights 1/(1+e^-1); base 2 would say o = 1.6667, lse = 1.5850
    (-INF, 0.5, 3.0, 0.5),  # an empty row must not count: lse 0.0 for it would give o = 2.245
    (0.5, -INF, 1.0, 0.5),
])
def test_golden_merges(lse: float, other: float, o: float, whole: float) -> None:
    """V is 1 on one side and 3 on the other (0 where nothing was seen)."""
    def part(value: float, score: float) -> State:
        return torch.full((1, 1, 1), 0.0 if score == -INF else value), torch.full((1, 1), score)

    o_THD, lse_TH = merged(part(1.0, lse), part(3.0, other))
    assert float(o_THD) == pytest.approx(o, abs=1e-6)
    assert float(lse_TH) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1e4], ids=["the device's kernel", "plain operations"])
def test_golden_tiles(softcap: float | None, dtype: torch.dtype) -> None:
    """Scores 0, ln 2, ln 4 by construction, then a row that sees one key and a row that sees none: each
    backend must speak natural logarithms and -inf, whatever it says by itself (base 2: 2.807; +inf; 0.0)."""
    spec = make_spec(kv_heads=1, group=1, dim=16, softcap=softcap)
    q, k, v = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)
    q[..., 0] = 4.0
    k[0, 0, :, 0] = torch.tensor([0.0, math.log(2.0), math.log(4.0)])
    v[0, 0, :, 0] = torch.tensor([7.0, 0.0, 0.0])
    visible = torch.tensor([[[True, True, True], [True, False, False], [False, False, False]]])
    bias = torch.zeros(1, 3, 3, dtype=dtype).masked_fill(~visible, -INF)
    o, lse = attend_tile(q.to(dtype), k.to(dtype), v.to(dtype), spec, visible, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert lse[0, 0].tolist() == pytest.approx([math.log(7.0), 0.0, -INF], abs=tolerance)
    assert o[0, 0, :, 0].tolist() == pytest.approx([1.0, 7.0, 0.0], abs=tolerance)
    dense_o, dense_lse = attend_tile(q.to(dtype), k.to(dtype), v.to(dtype), spec)
    assert dense_lse[0, 0].tolist() == pytest.approx([math.log(7.0)] * 3, abs=tolerance)
    assert dense_o[0, 0, :, 0].tolist() == pytest.approx([1.0] * 3, abs=tolerance)


def test_a_tile_without_keys_is_the_identity() -> None:
    """The CPU op dies of a division by zero there: it must never be asked."""
    q, none = torch.randn(2, 4, 3, 32), torch.zeros(2, 2, 0, 32)
    o, lse = attend_tile(q, none, none, make_spec())
    assert o.shape == (2, 4, 3, 32) and torch.all(o == 0)
    assert lse.shape == (2, 4, 3) and torch.all(lse == -INF)


@QUICK
@given(states(), states(), st.permutations(range(ROWS)), st.integers(0, ROWS))
def test_only_the_named_rows_are_merged(a: State, b: State, order: list[int], count: int) -> None:
    whole = merged(a, b)
    for rows in (torch.tensor(order[:count], dtype=torch.int64), slice(ROWS - count, ROWS)):
        o_THD, lse_TH = a[0].clone(), a[1].clone()
        merge_rows(o_THD, lse_TH, rows, b[0][rows], b[1][rows])
        named = torch.zeros(ROWS, dtype=torch.bool)
        named[rows] = True
        assert torch.equal(o_THD[named], whole[0][named]) and torch.equal(lse_TH[named], whole[1][named])
        assert torch.equal(o_THD[~named], a[0][~named]) and torch.equal(lse_TH[~named], a[1][~named])


@QUICK
@given(states(), st.lists(st.floats(-50, 50), min_size=HEADS, max_size=HEADS))
def test_a_sink_is_a_key_without_a_value(a: State, sinks: list[float]) -> None:
    sink_H = torch.tensor(sinks)
    o_THD, lse_TH = merged(a)
    merge_sink(o_THD, lse_TH, sink_H)
    key = (torch.zeros(ROWS, HEADS, DIM), sink_H.expand(ROWS, HEADS))
    assert_same((o_THD, lse_TH), formula(a, key))


def test_merging_many_bf16_parts_does_not_lose_precision() -> None:
    """64 ranks: the accumulators are fp32, so that only the parts themselves are rounded."""
    torch.manual_seed(0)
    parts = [(torch.randn(8, 2, 16).bfloat16() + 1, torch.randn(8, 2)) for _ in range(64)]
    o_THD, lse_TH = new_state(8, 2, 16, torch.bfloat16, torch.device("cpu"))
    for part in parts:
        merge_attention_states(o_THD, lse_TH, *part)
    assert_same((o_THD, lse_TH), formula(*parts))
