"""The cost model's formulas, by hand and by brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringserve.cost_model import CostModel, Machine, passes_kv
from ringserve.plan import LayerGroup


def group(window: int | None = None, heads: int = 8, kv_heads: int = 2, layers: int = 1) -> LayerGroup:
    return LayerGroup(num_kv_heads=kv_heads, key_dim=64, value_dim=64, window=window, layers=tuple(range(layers)),
                      num_heads=heads)


# C = 1e12, BW = 1e9, e = 2, N = 4, K/H = 1/4: the transfer hides from N C K e / (2 H BW) = 1000 tokens on.
MACHINE = Machine(flops=1e12, link_bytes_per_s=1e9, element_bytes=2, overlaps=True)
RANKS = 4
HIDDEN = 1000


@pytest.mark.parametrize(("new", "cached", "expected"), [
    (HIDDEN, 10**6, True),
    (HIDDEN - 100, 10**6, False),
    (2 * HIDDEN, 0, True),
    (10, 10**6, False),
    (1, 10**6, False),
])
def test_keys_travel_when_their_transfer_hides(new: int, cached: int, expected: bool) -> None:
    assert passes_kv(new, cached, group(), RANKS, MACHINE) is expected


def test_without_a_past_keys_travel_unless_they_are_many() -> None:
    """T / (T + P) is 1: with few KV heads always, with one per query head from N C e / (4 BW) tokens on."""
    many = group(heads=8, kv_heads=8)
    assert passes_kv(2, 0, group(), RANKS, MACHINE)
    assert next(t for t in range(1, 10 * HIDDEN) if passes_kv(t, 0, many, RANKS, MACHINE)) == 2 * HIDDEN


@given(st.integers(1, 3000), st.integers(0, 10**6), st.sampled_from([None, 128, 4096]),
       st.sampled_from([(8, 1), (8, 2), (8, 8)]), st.integers(1, 8))
def test_the_choice_is_the_papers_formula(
        new: int, cached: int, window: int | None, heads: tuple[int, int], ranks: int) -> None:
    h, k = heads
    past = cached if window is None else min(cached, window)
    c, bw, e = MACHINE.flops, MACHINE.link_bytes_per_s, MACHINE.element_bytes
    threshold = ranks * c * k * e / (2 * h * bw) * (1 if past else 2)
    share = 2 * k / h - 4 * new * bw / (ranks * c * e)
    expected = new >= threshold or new / (new + past) >= share
    assert passes_kv(new, cached, group(window, h, k), ranks, MACHINE) == expected


def test_a_window_layer_counts_only_what_its_window_reaches() -> None:
    """300 tokens after a million: queries travel; behind a window of 128, the keys are the smaller message."""
    assert not passes_kv(300, 10**6, group(), RANKS, MACHINE)
    assert passes_kv(300, 10**6, group(window=128), RANKS, MACHINE)


def test_an_endless_link_always_moves_keys() -> None:
    machine = Machine(flops=1e12, link_bytes_per_s=math.inf, element_bytes=2, overlaps=True)
    assert passes_kv(2, 10**6, group(), 1, machine)


def test_one_row_never_moves_keys() -> None:
    groups = [group(), group(window=8)]
    assert CostModel(groups, 0.0, RANKS, MACHINE, forced="pass-kv").modes(1, 5) == ["pass-q", "pass-q"]


def test_a_forced_mode_holds_for_every_chunk_and_group() -> None:
    groups = [group(), group(window=8)]
    assert CostModel(groups, 0.0, RANKS, MACHINE, forced="pass-kv").modes(2, 10**6) == ["pass-kv"] * 2
    assert CostModel(groups, 0.0, RANKS, MACHINE, forced="pass-q").modes(10**6, 0) == ["pass-q"] * 2


def test_modes_are_chosen_per_group() -> None:
    assert CostModel([group(), group(window=128)], 0.0, RANKS, MACHINE).modes(300, 10**6) == ["pass-q", "pass-kv"]


@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from([None, 1, 7, 100]), st.integers(1, 3))
def test_flops_count_every_visible_pair(start: int, more: int, window: int | None, layers: int) -> None:
    stop = start + more
    pairs = sum(1 for row in range(start, stop) for key in range(row + 1) if window is None or key > row - window)
    cost = CostModel([group(window, layers=layers)], 11.0, RANKS, MACHINE)
    assert cost.flops(start, stop) == pytest.approx(11.0 * more + pairs * layers * 2 * 8 * 128)


@given(st.lists(st.integers(0, 500), min_size=2, max_size=6).map(sorted))
def test_the_chunks_of_a_prompt_add_up_to_the_whole(cuts: list[int]) -> None:
    cost = CostModel([group(), group(window=50, layers=3)], 1e4, RANKS, MACHINE)
    parts = sum(cost.flops(a, b) for a, b in zip(cuts, cuts[1:]))  # noqa: RUF007
    assert parts == pytest.approx(cost.flops(cuts[0], cuts[-1]))


def test_seconds_are_unknown_until_a_step_was_measured() -> None:
    cost = CostModel([group()], 1.0, RANKS, MACHINE)
    assert cost.seconds(1e9, 1) is None
    cost.observe(1e9, 2.0)
    assert cost.seconds(2e9, 1) == pytest.approx(4.0)


def test_seconds_tell_the_constant_of_a_step_from_its_work() -> None:
    cost = CostModel([group()], 1.0, RANKS, MACHINE)
    for chunk in range(20):
        flops = 1e9 * (1 + chunk)
        cost.observe(flops, 0.5 + 1e-9 * flops)
    assert cost.seconds(30e9, 10) == pytest.approx(10 * 0.5 + 30.0, rel=1e-3)


def test_seconds_follow_a_machine_that_becomes_slower() -> None:
    cost = CostModel([group()], 1.0, RANKS, MACHINE)
    for factor in (1, 3):
        for chunk in range(60):
            cost.observe(1e9 * (1 + chunk % 20), factor * (1 + chunk % 20))
    assert cost.seconds(1e9, 1) == pytest.approx(3.0, rel=0.1)


@given(st.lists(st.tuples(st.floats(1e3, 1e15), st.floats(1e-4, 1e3)), min_size=1, max_size=50))
def test_seconds_are_never_negative(steps: list[tuple[float, float]]) -> None:
    cost = CostModel([group()], 1.0, RANKS, MACHINE)
    for flops, seconds in steps:
        cost.observe(flops, seconds)
    predicted = cost.seconds(1e12, 3)
    assert predicted is not None and predicted >= 0 and math.isfinite(predicted)


@pytest.mark.parametrize("cached, keys_travel", [(0, True), (2_000, True), (1_000_000, False)])
def test_where_transfers_take_the_cores_the_fewer_bytes_travel(cached: int, keys_travel: bool) -> None:
    machine = Machine(flops=1e12, link_bytes_per_s=1e9, element_bytes=2, overlaps=False)
    new = 1024
    keys = (new + cached) * 2 * (64 + 64) * 2
    queries = new * 8 * (64 * 2 + 64 * 4 + 4)
    assert passes_kv(new, cached, group(), 2, machine) == keys_travel == (keys <= queries)
