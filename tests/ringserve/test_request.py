"""What is missing of a request, against a plain set of positions, holes and other requests' blocks included."""

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringserve.block import Block, Copy
from ringserve.request import Request, RequestStatus
from ringserve.sampling_params import SamplingParams

Spans = list[tuple[int, int]]


def make_request(tokens: int, computed: list[int], size: int = 4, ring: int = 1) -> Request:
    """Blocks are dealt round the ring, and its own unless they are complete."""
    request = Request(request_id="r", handle=1, token_ids=array("I", range(tokens)), params=SamplingParams(),
                      seed=0, end_token_ids=(), max_total_tokens=tokens + 16, arrival=0.0)
    request.held, request.keys_on, request.reserved = [0] * ring, [0] * ring, [0] * ring
    for i, count in enumerate(computed):
        rank = i % ring
        block = Block({rank: Copy(rank, (i,))}, i, computed=count, owner=request if count < size else None,
                      users=[request])
        request.take_block(block, rank)
    return request


def mark(request: Request, spans: Spans, size: int) -> None:
    """What the scheduler does when a step is committed."""
    for p in positions(spans):
        block = request.blocks[p // size]
        assert block.computed == p % size
        block.computed += 1
        request.block_grew(p // size, 1)
        if block.computed == size:
            block.owner = None


def grow(request: Request) -> None:
    i, ring = len(request.blocks), len(request.held)
    request.take_block(Block({i % ring: Copy(i % ring, (i,))}, i, owner=request, users=[request]), i % ring)


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
    return make_request(tokens, computed, size, draw(st.integers(1, 3))), size, done


@given(requests(), st.integers(0, 50))
def test_the_missing_tokens_come_in_position_order(case: tuple[Request, int, set[int]], limit: int) -> None:
    request, size, done = case
    missing = [p for p in range(len(request.token_ids)) if p not in done]
    spans = request.missing(size, limit)
    assert positions(spans) == missing[:limit]
    assert all(a[1] < b[0] for a, b in pairwise(spans)), "spans touch"
    assert all(start < stop for start, stop in spans)


@given(requests(), st.integers(0, 50), st.sets(st.integers(0, 40)))
def test_it_computes_nothing_behind_a_block_that_another_computes(
        case: tuple[Request, int, set[int]], limit: int, theirs: set[int]) -> None:
    request, size, done = case
    other = make_request(1, [])
    for block in request.blocks:
        if block.index in theirs and block.computed < size:
            block.owner = other
    stop = min((b.index * size for b in request.blocks if b.owner is other), default=len(request.token_ids))
    assert positions(request.missing(size, limit)) == [p for p in range(stop) if p not in done][:limit]


@given(requests())
def test_counts_agree_with_the_set(case: tuple[Request, int, set[int]]) -> None:
    request, size, done = case
    assert request.done == sum(request.keys_on) == len(done)
    assert request.num_missing == len(request.token_ids) - len(done)
    request.check(size)


@given(requests(), st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_chunk_after_chunk_computes_everything_but_the_last_token(
        case: tuple[Request, int, set[int]], chunks: list[int]) -> None:
    request, size, done = case
    tokens = len(request.token_ids)
    for chunk in chunks:
        spans = request.missing(size, min(chunk, request.num_missing - 1))
        while len(request.blocks) * size < max((stop for _, stop in spans), default=0):
            grow(request)
        mark(request, spans, size)
        done |= set(positions(spans))
        request.check(size)
        assert request.done == len(done)
        assert request.num_missing == tokens - len(done) >= 1
        assert positions(request.missing(size, tokens)) == [p for p in range(tokens) if p not in done]


def test_adjacent_missing_tokens_are_one_span_and_holes_split_it() -> None:
    request = make_request(20, [4, 0, 4, 2, 0])
    assert request.missing(4, 100) == [(4, 8), (14, 20)]
    assert request.missing(4, 5) == [(4, 8), (14, 15)]
    assert request.missing(4, 3) == [(4, 7)]
    assert request.cursor == 1


def test_another_requests_block_is_passed_when_it_is_complete() -> None:
    request, other = make_request(16, [4, 2, 0, 0]), make_request(1, [])
    request.blocks[1].owner = other
    assert request.missing(4, 100) == []
    request.blocks[1].owner = request  # the other one is gone: it takes over what was computed
    assert request.missing(4, 100) == [(6, 16)]
    request.blocks[1].owner, request.blocks[2].owner = None, other
    request.blocks[1].computed = 4
    request.block_grew(1, 2)
    assert request.missing(4, 100) == []
    request.check(4)


def test_blocks_are_counted_on_the_rank_whose_copy_is_used() -> None:
    request = make_request(12, [4, 3, 0], ring=2)
    assert (request.held, request.keys_on, request.holders) == ([2, 1], [4, 3], [0, 1, 0])
    request.decode_work = [(0, [1.0])]
    both = Block({0: Copy(0, (7,)), 1: Copy(1, (8,))}, 3, users=[request])
    request.token_ids.extend([1, 2])
    request.take_block(both, 1)
    assert (request.held, request.keys_on, request.holders[3]) == ([2, 2], [4, 3], 1)
    assert request.decode_work is None, "what a token costs depends on the blocks"
    request.check(4)


def test_forgotten_blocks_are_missing_and_forgotten_once() -> None:
    request = make_request(10, [4, 4, 1], ring=2)
    request.home = 0
    request.missing(4, 1)
    blocks = request.forget_blocks()
    assert [b.index for b in blocks] == [0, 1, 2]
    assert request.forget_blocks() == [] and request.home is None
    assert (request.done, request.held, request.keys_on, request.ranks) == (0, [0, 0], [0, 0], [])
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


def test_check_finds_a_copy_that_is_not_there() -> None:
    request = make_request(10, [4, 4], ring=2)
    del request.blocks[1].copies[1]
    with pytest.raises(AssertionError):
        request.check(4)
