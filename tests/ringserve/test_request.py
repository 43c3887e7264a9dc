"""What is missing of a request, against a plain set of positions, holes included."""

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringserve.block_pool import Block
from ringserve.request import Request, RequestStatus
from ringserve.sampling_params import SamplingParams

Spans = list[tuple[int, int]]


def make_request(tokens: int, computed: list[int]) -> Request:
    request = Request(request_id="r", handle=1, token_ids=array("I", range(tokens)), params=SamplingParams(),
                      seed=0, end_token_ids=(), max_total_tokens=tokens + 16, ranks=[0], arrival=0.0)
    request.computed = array("I", computed)
    request.blocks = [Block(0, (i,)) for i in range(len(computed))]
    return request


def positions(spans: Spans) -> list[int]:
    return [p for start, stop in spans for p in range(start, stop)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Request, int, set[int]]:
    """A request with holes anywhere, its block size, and the positions that are computed."""
    size = draw(st.integers(1, 6))
    tokens = draw(st.integers(1, 40))
    blocks = draw(st.integers(0, -(-tokens // size)))
    computed = [draw(st.integers(0, min(size, tokens - i * size))) for i in range(blocks)]
    if sum(computed) == tokens:
        computed[-1] -= 1  # the last known token stays missing
    done = {i * size + within for i, n in enumerate(computed) for within in range(n)}
    return make_request(tokens, computed), size, done


@given(requests(), st.integers(0, 50))
def test_the_missing_tokens_come_in_position_order(case: tuple[Request, int, set[int]], limit: int) -> None:
    request, size, done = case
    missing = [p for p in range(len(request.token_ids)) if p not in done]
    spans = request.missing(size, limit)
    assert positions(spans) == missing[:limit]
    assert all(a[1] < b[0] for a, b in pairwise(spans)), "spans touch"
    assert all(start < stop for start, stop in spans)


@given(requests())
def test_counts_agree_with_the_set(case: tuple[Request, int, set[int]]) -> None:
    request, size, done = case
    assert request.num_computed() == len(done)
    assert request.num_missing(size) == len(request.token_ids) - len(done)
    request.check(size)


@given(requests(), st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_chunk_after_chunk_computes_everything_but_the_last_token(
        case: tuple[Request, int, set[int]], chunks: list[int]) -> None:
    request, size, done = case
    tokens = len(request.token_ids)
    for chunk in chunks:
        spans = request.missing(size, min(chunk, request.num_missing(size) - 1))
        while len(request.computed) * size < max((stop for _, stop in spans), default=0):
            request.blocks.append(Block(0, (len(request.blocks),)))
            request.computed.append(0)
        request.mark_computed(spans, size)
        done |= set(positions(spans))
        request.check(size)
        assert request.num_computed() == len(done)
        assert request.num_missing(size) == tokens - len(done) >= 1
        assert positions(request.missing(size, tokens)) == [p for p in range(tokens) if p not in done]


def test_adjacent_missing_tokens_are_one_span_and_holes_split_it() -> None:
    request = make_request(20, [4, 0, 4, 2, 0])
    assert request.missing(4, 100) == [(4, 8), (14, 20)]
    assert request.missing(4, 5) == [(4, 8), (14, 15)]
    assert request.missing(4, 3) == [(4, 7)]
    assert request.cursor == 1


def test_marking_again_changes_nothing() -> None:
    request = make_request(12, [4, 4, 1])
    request.mark_computed([(0, 4), (2, 9)], 4)
    assert list(request.computed) == [4, 4, 1]


def test_dropped_blocks_are_missing_and_dropped_once() -> None:
    request = make_request(10, [4, 4, 1])
    request.home = 0
    request.missing(4, 1)
    blocks = request.drop_blocks()
    assert [b.slots for b in blocks] == [(0,), (1,), (2,)]
    assert request.drop_blocks() == [] and request.home is None
    assert request.missing(4, 100) == [(0, 10)]
    request.check(4)


def test_prompt_and_output_are_counted_apart() -> None:
    request = make_request(5, [])
    request.token_ids.append(77)
    assert (request.prompt_tokens, request.output_tokens) == (5, 1)
    assert request.status is RequestStatus.WAITING


@pytest.mark.parametrize("computed", [[5], [4, 4, 4], [4, 4, 2]])
def test_check_finds_impossible_counts(computed: list[int]) -> None:
    with pytest.raises(AssertionError):
        make_request(10, computed).check(4)
