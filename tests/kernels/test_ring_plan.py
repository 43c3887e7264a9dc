"""Plans of all ranks together: what r sends to s is what s expects; every visible pair is attended once."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ringserve_kernels import AttentionPlan, RingPlan, plan_ring

from tests.kernels.coverage import covered
from tests.kernels.placements import Placement, placements, windows

LENGTHS = st.tuples(st.integers(0, 120), st.integers(1, 60))
Labels = NDArray[np.int64]
Pairs = dict[tuple[int, int], int]
SEQUENCE = 1_000_000
"""Label of a token: its index + SEQUENCE * number of its sequence. -1 is nobody's."""


def row_labels(placement: Placement, rank: int) -> Labels:
    parts = [s.spans[rank].index + SEQUENCE * n for n, s in enumerate(placement.sequences)]
    return np.concatenate(parts)


def key_labels(placement: Placement, rank: int) -> Labels:
    labels = np.full(placement.tokens, -1, dtype=np.int64)
    for n, s in enumerate(placement.sequences):
        index, offset = s.keys[rank].keys()
        labels[offset] = index + SEQUENCE * n
    return labels


def expected_pairs(placement: Placement, window: int | None) -> Pairs:
    pairs: Pairs = {}
    for n, s in enumerate(placement.sequences):
        keys = np.concatenate([blocks.keys()[0] for blocks in s.keys])
        for row in np.concatenate([span.index for span in s.spans]):
            seen = keys[(keys <= row) & (True if window is None else keys > row - window)]
            pairs.update({(int(row) + SEQUENCE * n, int(key) + SEQUENCE * n): 1 for key in seen})
    return pairs


def count(pairs: Pairs, plan: AttentionPlan, rows: Labels, keys: Labels) -> None:
    assert len(rows) == plan.rows
    counts = covered(plan, len(keys))
    for row, key in zip(*np.nonzero(counts)):
        pairs[int(rows[row]), int(keys[key])] += int(counts[row, key])


def all_plans(placement: Placement, window: int | None, segment: int) -> list[RingPlan]:
    size = placement.size
    return [plan_ring(rank, size, placement.sequences, window, segment) for rank in range(size)]


@settings(max_examples=50, deadline=None)
@given(placements(st.integers(1, 5), LENGTHS), windows(), st.sampled_from([1, 8, 64, 8192]))
def test_what_one_rank_sends_is_what_the_other_expects(
        placement: Placement, window: int | None, segment: int) -> None:
    """Per ordered pair of ranks: the same kinds and sizes of messages in the same order, none empty."""
    sent: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    awaited: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    for rank, plan in enumerate(all_plans(placement, window, segment)):
        for kind, exchanges in (("queries", plan.queries), ("segment", plan.segments)):
            for e in exchanges:
                to, source = (rank + e.shift) % placement.size, (rank - e.shift) % placement.size
                assert e.send_count or e.receive_count
                if e.send_count:
                    sent[rank, to].append((kind, e.send_count))
                if e.receive_count:
                    awaited[source, rank].append((kind, e.receive_count))
        for e in plan.queries:  # the partials go home: by a shift of -shift
            to, source = (rank - e.shift) % placement.size, (rank + e.shift) % placement.size
            if e.receive_count:
                sent[rank, to].append(("return", e.receive_count))
            if e.send_count:
                awaited[source, rank].append(("return", e.send_count))
        for segment_exchange in plan.segments:
            assert segment_exchange.send_count == sum(length for _, length in segment_exchange.send_runs)
    assert sent == awaited


@settings(max_examples=30, deadline=None)
@given(placements(st.integers(1, 4), LENGTHS, most=3), windows(), st.sampled_from([1, 8, 64, 8192]))
def test_over_all_ranks_every_visible_pair_is_attended_once(
        placement: Placement, window: int | None, segment: int) -> None:
    plans = all_plans(placement, window, segment)
    rows = [row_labels(placement, rank) for rank in range(placement.size)]
    keys = [key_labels(placement, rank) for rank in range(placement.size)]
    mail: dict[tuple[str, int, int], list[Labels]] = defaultdict(list)
    for rank, plan in enumerate(plans):
        for q in plan.queries:
            if q.send_count:
                mail["queries", rank, (rank + q.shift) % placement.size].append(rows[rank][q.send_rows])
        for s in plan.segments:
            runs = [keys[rank][offset:offset + length] for offset, length in s.send_runs]
            if runs:
                mail["segment", rank, (rank + s.shift) % placement.size].append(np.concatenate(runs))
    pairs: Pairs = defaultdict(int)
    for rank, plan in enumerate(plans):
        count(pairs, plan.local, rows[rank], keys[rank])
        for q in plan.queries:
            if q.receive_count:
                arrived = mail["queries", (rank - q.shift) % placement.size, rank].pop(0)
                assert len(arrived) == q.receive_count
                count(pairs, q.plan, arrived, keys[rank])
        for s in plan.segments:
            if s.receive_count:
                message = mail["segment", (rank - s.shift) % placement.size, rank].pop(0)
                assert len(message) == s.receive_count
                count(pairs, s.plan, rows[rank], message)
    assert not any(mail.values()), "a message was sent that nobody expects"
    assert dict(pairs) == expected_pairs(placement, window)


@settings(max_examples=30, deadline=None)
@given(placements(st.integers(2, 4), LENGTHS), windows(), st.sampled_from([1, 8, 64]))
def test_a_message_is_no_longer_than_a_segment_or_a_block(
        placement: Placement, window: int | None, segment: int) -> None:
    longest = max((int(n) for s in placement.sequences for keys in s.keys for n in keys.length), default=0)
    for plan in all_plans(placement, window, segment):
        for s in plan.segments:
            assert max(s.send_count, s.receive_count) <= max(segment, longest)


@settings(max_examples=30, deadline=None)
@given(placements(st.integers(2, 4), LENGTHS), windows())
def test_the_mode_of_a_sequence_says_what_travels(placement: Placement, window: int | None) -> None:
    plans = all_plans(placement, window, 64)
    if not any(s.pass_q for s in placement.sequences):
        assert not any(plan.queries for plan in plans)
    if all(s.pass_q for s in placement.sequences):
        assert not any(plan.segments for plan in plans)


@settings(max_examples=20, deadline=None)
@given(placements(st.just(1), LENGTHS), windows())
def test_a_ring_of_one_sends_nothing(placement: Placement, window: int | None) -> None:
    [plan] = all_plans(placement, window, 64)
    assert not plan.queries and not plan.segments and not plan.is_empty


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_step_without_rows_is_empty_on_every_rank(rank: int) -> None:
    assert plan_ring(rank, 3, [], None, 64).is_empty
