"""The cost model: its formulas by hand and by brute force, and its fit against machines that are made up."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringserve.cost_model import (
    EXCHANGE,
    FEATURES,
    FLOP,
    KEY_BYTE,
    OUTLIER,
    REQUEST,
    SENT_BYTE,
    STEP,
    TOKEN,
    CostModel,
    Errors,
    Machine,
    N,
    StepCost,
    Vector,
    passes_kv,
)
from ringserve.plan import LayerGroup


def group(window: int | None = None, heads: int = 8, kv_heads: int = 2, layers: int = 1) -> LayerGroup:
    return LayerGroup(num_kv_heads=kv_heads, key_dim=64, value_dim=64, window=window, layers=tuple(range(layers)),
                      num_heads=heads, key_bytes=kv_heads * 128 * 2)


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


@pytest.mark.parametrize("cached, keys_travel", [(0, True), (2_000, True), (1_000_000, False)])
def test_where_transfers_take_the_cores_the_fewer_bytes_travel(cached: int, keys_travel: bool) -> None:
    machine = Machine(flops=1e12, link_bytes_per_s=1e9, element_bytes=2, overlaps=False)
    new = 1024
    keys = (new + cached) * 2 * (64 + 64) * 2
    queries = new * 8 * (64 * 2 + 64 * 4 + 4)
    assert passes_kv(new, cached, group(), 2, machine) == keys_travel == (keys <= queries)


# The work of a step

CPU = replace(MACHINE, overlaps=False)
"""Transfers take the cores that compute: all three of computing, reading and sending count."""


def summed(work: list[tuple[int, Vector]]) -> Vector:
    return [sum(features[i] for _, features in work) for i in range(N)]


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """New tokens and keys that are there, on each of some ranks."""
    ring = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(0, 40), min_size=ring, max_size=ring).filter(any))
    held = draw(st.lists(st.integers(0, 300), min_size=ring, max_size=ring))
    return tokens, held


@given(shares(), st.sampled_from(["pass-kv", "pass-q"]), st.integers(1, 3))
def test_work_adds_up_over_the_ranks_to_the_whole(shared: tuple[list[int], list[int]], mode: str,
                                                  layers: int) -> None:
    """FLOPs, tokens, and bytes as written in the design: keys (N-1) x all x K x (Dk + Dv) x e, queries and partial
    results T x (N-1) x (H x Dk x e + H x (Dv + 1) x 4)."""
    tokens, held = shared
    new, cached, ring = sum(tokens), sum(held), len(tokens)
    cost = CostModel([group(layers=layers)], 11.0, ring, CPU, forced=mode)  # type: ignore[arg-type]
    work = cost.work(cached, tokens, held)
    involved = [r for r in range(ring) if tokens[r] or held[r]]
    assert [rank for rank, _ in work] == involved
    total, others = summed(work), len(involved) - 1
    assert total[STEP] == 0 and total[REQUEST] == len(involved) and total[TOKEN] == new
    assert total[FLOP] + 11.0 * new == pytest.approx(cost.flops(cached, cached + new))
    if mode == "pass-kv" and new > 1:
        assert total[SENT_BYTE] == pytest.approx(layers * others * (new + cached) * 2 * (64 + 64) * 2)
        assert total[EXCHANGE] == layers * others * len(involved)
        readers = sum(count > 0 for count in tokens)
        assert total[KEY_BYTE] == pytest.approx(layers * readers * (new + cached) * 2 * (64 + 64) * 2)
    else:
        assert total[SENT_BYTE] == pytest.approx(layers * new * others * (8 * 64 * 2 + 8 * (64 + 1) * 4))
        assert total[EXCHANGE] == layers * 2 * others * len(involved)
        assert total[KEY_BYTE] == pytest.approx(layers * (new + cached) * 2 * (64 + 64) * 2), "each key is read once"


@given(shares(), st.integers(1, 50))
def test_a_window_layer_works_on_what_its_window_reaches(shared: tuple[list[int], list[int]], window: int) -> None:
    tokens, held = shared
    new, cached = sum(tokens), sum(held)
    cost = CostModel([group(window)], 0.0, len(tokens), CPU, forced="pass-q")
    total = summed(cost.work(cached, tokens, held))
    assert total[FLOP] == pytest.approx(cost.flops(cached, cached + new))
    assert total[KEY_BYTE] == pytest.approx(min(new + cached, new + window) * 2 * 128 * 2)


def test_where_work_overlaps_only_the_slowest_costs_time() -> None:
    cost = CostModel([group()], 0.0, 2, MACHINE)
    for _, features in cost.work(5000, [64, 64], [2500, 2500]) + cost.work(0, [2048, 0], [0, 0]):
        assert sum(features[i] > 0 for i in (FLOP, KEY_BYTE, SENT_BYTE)) == 1


def test_a_step_costs_as_much_as_its_busiest_rank() -> None:
    cost = CostModel([group()], 1e9, 3, CPU)
    step = StepCost(cost)
    assert step.seconds() == cost.weights[STEP]
    step.add(cost.work(0, [64, 0, 0], [0, 0, 0]))
    alone = step.seconds()
    step.add(cost.work(0, [0, 32, 0], [0, 0, 0]))
    assert step.seconds() == alone, "a smaller request on another rank is free"
    more = cost.work(0, [0, 64, 0], [0, 0, 0])
    predicted = step.seconds(more)
    assert alone < predicted and step.seconds() == alone, "asking adds nothing"
    step.add(more)
    assert step.seconds() == pytest.approx(predicted)
    assert step.features()[STEP] == 1.0 and step.features()[TOKEN] == 96


@pytest.mark.parametrize("machine", [CPU, MACHINE])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 4096, 400_000])
@pytest.mark.parametrize("new", [1, 64, 512])
def test_the_formula_for_one_request_is_the_step_with_that_request(machine: Machine, width: int, start: int,
                                                                   new: int) -> None:
    groups = [group(layers=2), group(window=1000, layers=3)]
    cost = CostModel(groups, 1e9, 4, machine)
    step = StepCost(cost)
    tokens = [new // width if rank < width else 0 for rank in range(4)] if new > 1 else [1, 0, 0, 0]
    step.add(cost.work(start, tokens, [start // width if rank < width else 0 for rank in range(4)]))
    if new > 1:
        assert cost.chunk_seconds(start, new, width) == pytest.approx(step.seconds())
    else:  # one row is on one rank: the formula shares its token out
        assert cost.chunk_seconds(start, 1, width) == pytest.approx(step.seconds(), rel=0.5)


# Seconds

TRUE = [3e-3, 5e-4, 2e-6, 4e-12, 3e-10, 2e-9, 8e-5]
"""A machine: seconds of each feature."""


def fresh(machine: Machine = CPU, ring: int = RANKS) -> CostModel:
    return CostModel([group(layers=4)], 1e9, ring, machine)


def seconds_on(features: Vector, machine: Vector) -> float:
    return sum(a * b for a, b in zip(features, machine))


def random_step(cost: CostModel, source: random.Random) -> StepCost:
    """A few decodes, and chunks of prompts of any length, on one rank or all."""
    step = StepCost(cost)
    for _ in range(source.randint(0, 12)):
        keys = int(2 ** source.uniform(5, 18))
        rank, width = source.randrange(cost.ring_size), source.choice([1, cost.ring_size])
        tokens = [int(r == rank) for r in range(cost.ring_size)]
        step.add(cost.work(keys, tokens, [keys // width if width > 1 or r == rank else 0
                                          for r in range(cost.ring_size)]))
    for _ in range(source.randint(0 if any(map(any, step.ranks)) else 1, 2)):
        new, start = int(2 ** source.uniform(5, 11)), int(2 ** source.uniform(0, 17))
        rank, width = source.randrange(cost.ring_size), source.choice([1, cost.ring_size])
        tokens, held = ([count // width if width > 1 or r == rank else 0 for r in range(cost.ring_size)]
                        for count in (new, start))
        step.add(cost.work(start, tokens, held))
    return step


def run(cost: CostModel, machine: Vector, steps: int, seed: int = 0, noise: float = 0.0, stray: float = 0.0) -> None:
    source = random.Random(seed)
    for _ in range(steps):
        features = random_step(cost, source).features()
        seconds = seconds_on(features, machine) * math.exp(source.gauss(0, noise))
        cost.observe(features, seconds * (50 if source.random() < stray else 1))


def errors_after(cost: CostModel, machine: Vector, seed: int = 99) -> list[float]:
    """Relative errors for steps that it has not seen, sorted."""
    source = random.Random(seed)
    errors = []
    for _ in range(200):
        step = random_step(cost, source)
        true = seconds_on(step.features(), machine)
        errors.append(abs(step.seconds() - true) / true)
    return sorted(errors)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_finds_the_machine(seed: int) -> None:
    cost = fresh()
    before = errors_after(cost, TRUE)
    run(cost, TRUE, 600, seed)
    errors = errors_after(cost, TRUE)
    assert errors[100] < 0.02 and errors[190] < 0.05 < before[100]
    for weight, true, name in zip(cost.weights, TRUE, FEATURES):
        if name in ("step", "flop", "key_byte", "sent_byte"):
            assert weight == pytest.approx(true, rel=0.25), name


def test_the_fit_stands_noise() -> None:
    cost = fresh()
    run(cost, TRUE, 600, noise=0.1)
    errors = errors_after(cost, TRUE)
    assert errors[100] < 0.06 and errors[190] < 0.2


def test_few_steps_do_better_than_none() -> None:
    cost = fresh()
    before = errors_after(cost, TRUE)[100]
    run(cost, TRUE, 30)
    assert errors_after(cost, TRUE)[100] < before / 3


@pytest.mark.parametrize("factor, steps", [(0.25, 300), (2.0, 600), (4.0, 1000)])
def test_the_fit_follows_a_machine_that_becomes_slower_or_faster(factor: float, steps: int) -> None:
    """Slower takes longer to be believed: what was fast weighs more in relative terms."""
    cost = fresh()
    run(cost, TRUE, 300)
    later = [w * factor for w in TRUE]
    run(cost, later, steps, seed=1)
    assert errors_after(cost, later)[100] < 0.15


def test_steps_that_took_far_too_long_change_little() -> None:
    cost = fresh()
    run(cost, TRUE, 300)
    run(cost, TRUE, 300, seed=1, stray=0.01)
    assert errors_after(cost, TRUE)[100] < 0.15


def test_one_outlier_counts_as_no_more_than_its_cut() -> None:
    cost, other = fresh(), fresh()
    for one in (cost, other):
        run(one, TRUE, 100)
    features = random_step(cost, random.Random(5)).features()
    predicted = seconds_on(features, cost.weights)
    cost.observe(features, 1e6 * predicted)
    other.observe(features, OUTLIER * predicted)
    assert cost.weights == pytest.approx(other.weights)


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.just(0.0) | st.floats(1e-4, 1e4), min_size=N - 1, max_size=N - 1),
                          st.floats(1e-4, 1e3)), min_size=1, max_size=60))
@example([([0.0] * 6, 1.0), ([0.0] * 5 + [1.0], 1e-4), ([0.0] * 6, 1.0)])  # after which an empty step costs nothing
def test_weights_are_never_negative(steps: list[tuple[list[float], float]]) -> None:
    """Features of any size (in units of what the machine was thought to do in a ms) that took any time."""
    cost = fresh()
    prior = list(cost.weights)
    for sizes, seconds in steps:
        cost.observe([1.0, *(1e-3 * size / weight for size, weight in zip(sizes, prior[1:]))], seconds)
        assert all(math.isfinite(w) and w >= 0 for w in cost.weights)
        assert math.isfinite(cost.chunk_seconds(1000, 64, 2)) and cost.chunk_seconds(1000, 64, 2) >= 0
    assert 1 <= cost.chunk_tokens(1000, 2, 0.1, 2048, 64) <= 2048


def test_its_own_error_is_known() -> None:
    cost = fresh()
    assert cost.errors.quantile(0.5) is None and cost.steps == 0
    run(cost, TRUE, 400)
    median, tail = cost.errors.quantile(0.5), cost.errors.quantile(0.95)
    assert cost.steps == 400 and median is not None and tail is not None and median <= tail < 0.1


def test_errors_are_of_the_latest_steps() -> None:
    errors = Errors(memory=4)
    for error in (9.0, 9.0, 4.0, 1.0, 3.0, 2.0):
        errors.add(error)
    assert [errors.quantile(q) for q in (0.0, 0.5, 1.0)] == [1.0, 3.0, 4.0]


# Chunks

MODELS = st.sampled_from([(CPU, None), (CPU, "pass-q"), (CPU, "pass-kv"), (MACHINE, None)])


@given(MODELS, st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.floats(1e-4, 2.0), st.integers(1, 4096),
       st.sampled_from([1, 16, 64]))
def test_a_chunk_fits_its_budget_or_is_the_least(model: tuple[Machine, str | None], start: int, width: int,
                                                 budget: float, most: int, unit: int) -> None:
    machine, mode = model
    cost = CostModel([group(layers=3), group(window=512)], 1e8, RANKS, machine, forced=mode)  # type: ignore[arg-type]
    chunk = cost.chunk_tokens(start, width, budget, most, unit)
    assert min(unit, most) <= chunk <= most
    if chunk > unit:
        assert cost.chunk_seconds(start, chunk, width) <= budget
    if chunk < most and mode is not None and cost.chunk_seconds(start, unit, width) < budget:
        # Not far below what would fit, either.
        assert cost.chunk_seconds(start, math.ceil(1.1 * chunk) + 1, width) > budget


@pytest.mark.parametrize("width", [1, 4])
def test_chunks_shrink_as_the_cached_part_grows(width: int) -> None:
    cost = CostModel([group(layers=8)], 1e8, RANKS, CPU, forced="pass-q")
    budget = cost.chunk_seconds(0, 2048, width)
    chunks = [cost.chunk_tokens(start, width, budget, 2048, 16) for start in range(0, 1_000_000, 20_000)]
    assert chunks[0] == 2048 and chunks[-1] < 1024
    assert all(later <= earlier for earlier, later in zip(chunks, chunks[1:]))  # noqa: RUF007


def test_a_budget_without_end_takes_everything() -> None:
    assert fresh().chunk_tokens(10**6, 1, math.inf, 2048, 64) == 2048
    assert fresh().chunk_tokens(10**6, 1, 0.0, 2048, 64) == 64
    assert fresh().chunk_tokens(0, 1, 0.0, 30, 64) == 30


@pytest.mark.parametrize("zeros", [[TOKEN], [TOKEN, KEY_BYTE], [TOKEN, FLOP], [STEP, REQUEST],
                                   [TOKEN, KEY_BYTE, SENT_BYTE], list(range(N))])
@pytest.mark.parametrize("machine", [CPU, MACHINE, replace(MACHINE, key_bytes_per_s=2e7)])
def test_chunks_of_a_machine_whose_fit_has_zeros(zeros: list[int], machine: Machine) -> None:
    for start in (0, 1000, 100_000):
        for width in (1, 2, 4):
            cost = fresh(machine)
            for i in zeros:
                cost.weights[i] = 0.0
            for budget in (1e-6, 1e-4, 3e-3, 1e-2, 0.1, 1.0):
                chunk = cost.chunk_tokens(start, width, budget, 2048, 64)
                assert 64 <= chunk <= 2048
                assert chunk == 64 or cost.chunk_seconds(start, chunk, width) <= budget


def added_up(cost: CostModel, start: int, stop: int, width: int, budget: float, most: int, unit: int) -> float:
    seconds = 0.0
    while start < stop:
        chunk = min(cost.chunk_tokens(start, width, budget, most, unit), stop - start)
        seconds += cost.chunk_seconds(start, chunk, width)
        start += chunk
    return seconds


@pytest.mark.parametrize("machine, mode", [(CPU, "pass-q"), (CPU, "pass-kv"), (CPU, None), (MACHINE, None)])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("start, stop", [(0, 60_000), (30_000, 90_000), (0, 400_000), (500_000, 560_000)])
@pytest.mark.parametrize("budget", [0.05, 0.5, math.inf])
def test_a_prefill_takes_as_long_as_its_chunks(machine: Machine, mode: str | None, width: int, start: int, stop: int,
                                               budget: float) -> None:
    cost = CostModel([group(layers=4), group(window=512)], 1e8, RANKS, machine, forced=mode)  # type: ignore[arg-type]
    predicted = cost.prefill_seconds(start, stop, width, budget, 2048, 64)
    assert predicted == pytest.approx(added_up(cost, start, stop, width, budget, 2048, 64), rel=0.05)


def test_a_prefill_of_one_chunk_is_that_chunk() -> None:
    cost = fresh()
    assert cost.prefill_seconds(100, 100, 2, 1.0, 2048, 64) == 0.0
    assert cost.prefill_seconds(100, 90, 2, 1.0, 2048, 64) == 0.0
    assert cost.prefill_seconds(100, 200, 2, math.inf, 2048, 64) == cost.chunk_seconds(100, 100, 2)


@pytest.mark.parametrize("budget", [0.05, math.inf])
def test_a_longer_prefill_takes_longer(budget: float) -> None:
    cost = fresh()
    seconds = [cost.prefill_seconds(0, tokens, 2, budget, 2048, 64) for tokens in range(1, 20_000, 500)]
    assert all(later > 0.97 * earlier for earlier, later in zip(seconds, seconds[1:]))  # noqa: RUF007
    assert seconds[-1] > 10 * seconds[1]


def test_a_token_costs_what_its_step_costs_more() -> None:
    cost = fresh()
    assert cost.decode_seconds(1000, 1) == pytest.approx(cost.chunk_seconds(1000, 1, 1) - cost.weights[STEP])
    assert 0 < cost.decode_seconds(1000, 1) < cost.decode_seconds(10**6, 1)


def test_copies_cost_their_bytes() -> None:
    cost = fresh()
    per_token = 4 * 2 * (64 + 64) * 2
    assert cost.kv_bytes_per_token == per_token
    assert cost.copy_seconds(1000) - cost.copy_seconds(0) == pytest.approx(1000 * per_token / CPU.link_bytes_per_s)


def test_the_rule_uses_what_was_learned() -> None:
    """A link that is ten times faster than was measured: keys travel earlier."""
    cost = fresh(MACHINE)
    assert cost.modes(HIDDEN // 2, 10**6, RANKS) == ["pass-q"]
    for _ in range(300):
        features: Vector = [1.0, 1.0, 0.0, 1e11, 0.0, 0.0, 0.0]
        cost.observe(features, seconds_on(features, cost.weights))
        features = [1.0, 1.0, 0.0, 0.0, 0.0, 1e9, 0.0]
        cost.observe(features, 0.1)
    assert cost.modes(HIDDEN // 2, 10**6, RANKS) == ["pass-kv"]


# What outlives the server

def test_what_was_learned_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "somewhere" / "cost.json"
    cost = fresh()
    run(cost, TRUE, 300)
    cost.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["cost.json"], "no scratch file is left"
    again = fresh()
    assert again.load(path)
    assert again.weights == pytest.approx([w or old for w, old in zip(cost.weights, fresh().weights)])
    assert errors_after(again, TRUE)[100] < 0.05
    run(again, TRUE, 50, seed=3)
    assert errors_after(again, TRUE)[100] < 0.05


def test_what_was_learned_is_overwritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text("x" * 10_000)
    fresh().save(path)
    assert fresh().load(path)


def test_a_weight_of_zero_is_not_believed_for_ever(tmp_path: Path) -> None:
    cost = fresh()
    cost.weights[TOKEN] = 0.0
    cost.save(tmp_path / "cost.json")
    again = fresh()
    assert again.load(tmp_path / "cost.json") and again.weights == fresh().weights


def written(weights: object, features: Sequence[object] = FEATURES) -> str:
    return json.dumps({"features": features, "weights": weights, "steps": 1})


@pytest.mark.parametrize("text", [
    "", "{", "null", "3", "[]", "{}", '"features"', "\0\0\0", '{"features": 1, "weights": 2}',
    written([1.0] * N, FEATURES[:-1]), written([1.0] * N, ["other", *FEATURES[1:]]),
    written([*[1.0] * (N - 1), -1.0]), written([*[1.0] * (N - 1), math.nan]), written([*[1.0] * (N - 1), math.inf]),
    written([*[1.0] * (N - 1), "much"]), written([*[1.0] * (N - 1), None]), written(None),
    written([1.0] * (N - 1)), written([]), written([1.0] * (N + 1)), written([*[1.0] * (N - 1), 10**400]),
])
def test_a_file_that_makes_no_sense_is_passed_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    cost = fresh()
    before = list(cost.weights)
    assert not cost.load(path)
    assert cost.weights == before


def test_a_file_that_is_not_there_or_no_text_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    assert not fresh().load(path)
    path.write_bytes(b"\xff\xfe\x80")
    assert not fresh().load(path)
    assert not fresh().load(tmp_path)
