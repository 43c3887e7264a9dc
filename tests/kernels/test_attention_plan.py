"""How attention is cut into tiles: every visible pair once, no other pair ever, in shapes that are fast."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import KeyBlocks, RowSpan, attention_plan, plan_attention
from ringserve_kernels.attention_plan import DENSE_KEYS, TILE_ROWS

from tests.kernels.coverage import covered, visible_pairs
from tests.kernels.placements import Placement, placements, windows

SHORT = st.tuples(st.integers(0, 120), st.integers(1, 60))
LONG = st.tuples(st.integers(0, 3 * DENSE_KEYS), st.integers(1, TILE_ROWS + 90))


def assert_covers(placement: Placement, window: int | None) -> None:
    sequences = [(s.spans[0], s.keys[0]) for s in placement.sequences]
    rows = sum(len(span.index) for span, _ in sequences)
    plan = plan_attention(rows, sequences, window)
    assert plan.rows == rows
    expected = visible_pairs(rows, placement.tokens, sequences, window)
    np.testing.assert_array_equal(covered(plan, placement.tokens), expected)


@settings(max_examples=60, deadline=None)
@given(placements(st.just(1), SHORT), windows())
def test_every_visible_pair_is_covered_once(placement: Placement, window: int | None) -> None:
    assert_covers(placement, window)


@settings(max_examples=15, deadline=None)
@given(placements(st.just(1), LONG, most=2), windows())
def test_dense_tiles_cover_no_pair_that_others_cover(placement: Placement, window: int | None) -> None:
    assert_covers(placement, window)


@settings(max_examples=40, deadline=None)
@given(placements(st.just(1), SHORT), windows())
def test_padding_stays_inside_the_own_keys(placement: Placement, window: int | None) -> None:
    """What lies elsewhere in the storage may be another sequence's, even NaN: padding may not touch it."""
    for s in placement.sequences:
        own = set(s.keys[0].keys()[1].tolist())
        span = RowSpan(0, s.spans[0].index)
        for tiles in plan_attention(len(span.index), [(span, s.keys[0])], window).tiles.gathered:
            assert set(tiles.keys_NS.flatten().tolist()) <= own


def blocks(first: list[int], length: list[int], offset: list[int]) -> KeyBlocks:
    return KeyBlocks(*(np.array(x, dtype=np.int64) for x in (first, length, offset)))


def test_runs_join_adjacent_slots_in_order() -> None:
    held = blocks([0, 4, 8, 12, 16], [4, 4, 4, 4, 2], [8, 12, 0, 4, 20])
    assert held.runs() == [(8, 8), (0, 8), (20, 2)]
    assert held.tokens == 18
    assert blocks([], [], []).runs() == []


def test_a_partly_filled_block_ends_a_run() -> None:
    assert blocks([0, 4], [3, 4], [0, 4]).runs() == [(0, 3), (4, 4)]


@pytest.mark.parametrize(("rows", "window", "expected"), [
    ([40], None, [0, 16, 32]),
    ([15], None, [0]),
    ([16], None, [0, 16]),
    ([48], 17, [32]),
    ([48], 18, [16, 32]),
    ([63, 64], 16, []),
    ([], None, []),
])
def test_reach_is_what_at_least_one_row_may_see(
        rows: list[int], window: int | None, expected: list[int]) -> None:
    held = blocks([0, 16, 32], [16, 16, 16], [0, 16, 32])
    assert held.in_reach(np.array(rows, dtype=np.int64), window).first.tolist() == expected


def test_a_decode_row_over_adjacent_slots_is_one_dense_tile() -> None:
    n = 40
    held = blocks([64 * i for i in range(n)], [64] * n, [64 * (i + 3) for i in range(n)])
    plan = plan_attention(1, [(RowSpan(0, np.array([64 * n - 1])), held)], None)
    assert not plan.tiles.gathered
    assert [(t.key_start, t.key_stop) for t in plan.tiles.dense] == [(192, 192 + 64 * n)]


def test_a_window_layer_gathers_only_the_window() -> None:
    n, window = 400, 128
    held = blocks([64 * i for i in range(n)], [64] * n, [64 * i for i in range(n)])
    rows = np.arange(64 * n - 64, 64 * n)
    plan = plan_attention(64, [(RowSpan(0, rows), held)], window)
    assert not plan.tiles.dense
    assert sum(tiles.keys_NS.numel() for tiles in plan.tiles.gathered) <= window + 64 + 64


def test_the_past_of_a_long_prompt_is_dense_and_the_mask_is_only_the_frontier() -> None:
    n, chunk = 64, 512
    held = blocks([64 * i for i in range(n)], [64] * n, [64 * i for i in range(n)])
    rows = np.arange(64 * n - chunk, 64 * n)
    plan = plan_attention(chunk, [(RowSpan(0, rows), held)], None)
    masked = sum(tiles.visible_NTS.numel() for tiles in plan.tiles.gathered)
    assert masked <= chunk * (TILE_ROWS + DENSE_KEYS)


def test_no_dense_call_takes_more_keys_than_bounds_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "MOST_KEYS", 600)
    blocks = KeyBlocks(np.arange(0, 5000, 50), np.full(100, 50), np.arange(0, 5000, 50))
    plan = plan_attention(2, [(RowSpan(0, np.array([5000, 5001])), blocks)], None)
    assert all(tile.key_stop - tile.key_start <= 600 for tile in plan.tiles.dense)
    assert [tile.key_start for tile in plan.tiles.dense] == list(range(0, 5000, 600))
    assert plan.tiles.dense[-1].key_stop == 5000
