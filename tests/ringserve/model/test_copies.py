"""Copies of a plan as exchanges: what r sends to s is what s expects, and every block comes to its slot."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import KeyValues

from ringserve.model.copies import copy_blocks, plan_copies
from ringserve.plan import BlockCopy
from tests.kernels.thread_ring import ThreadRing, run_ring

BLOCK, SLOTS = 4, 24
GROUP_OF = [0, 1, 0]
SHAPES = [(2, 3, 5), (1, 4, 4), (2, 3, 5)]
"""Per layer: kv heads, key dim, value dim."""


@st.composite
def copies(draw: st.DrawFn) -> tuple[int, list[BlockCopy]]:
    """(ring size, copies): sources in the lower half of the slots, destinations in the upper half, each once."""
    size = draw(st.integers(2, 4))
    pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda pair: pair[0] != pair[1])
    pick = draw(st.randoms(use_true_random=False))
    free = [[pick.sample(range(SLOTS // 2, SLOTS), SLOTS // 2) for _ in range(2)] for _ in range(size)]
    drawn = draw(st.lists(pairs, max_size=SLOTS // 2))
    return size, [BlockCopy(source, destination, [pick.randrange(SLOTS // 2) for _ in range(2)],
                            [slots.pop() for slots in free[destination]]) for source, destination in drawn]


def filled_layers(rank: int) -> list[KeyValues]:
    """Caches whose every number is another one."""
    generator = torch.Generator().manual_seed(rank)
    return [KeyValues(*(torch.rand(heads, SLOTS * BLOCK, dim, generator=generator) for dim in dims))
            for heads, *dims in SHAPES]


@settings(max_examples=60, deadline=None)
@given(copies(), st.integers(1, 5))
def test_what_one_rank_sends_is_what_the_other_expects(drawn: tuple[int, list[BlockCopy]], most: int) -> None:
    size, plan = drawn
    sent: dict[tuple[int, int], list[int]] = defaultdict(list)
    awaited: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(size):
        for e in plan_copies(rank, size, plan, most):
            [out], [into] = {len(s) for s in e.send_slots}, {len(s) for s in e.receive_slots}
            assert 0 < max(out, into) <= most
            if out:
                sent[rank, (rank + e.shift) % size].append(out)
            if into:
                awaited[(rank - e.shift) % size, rank].append(into)
    assert sent == awaited
    assert sum(map(sum, sent.values())) == len(plan)


@settings(max_examples=40, deadline=None)
@given(copies(), st.integers(1, 5))
def test_every_block_comes_to_its_slot_and_nothing_else_changes(drawn: tuple[int, list[BlockCopy]],
                                                                most: int) -> None:
    size, plan = drawn
    caches = [filled_layers(rank) for rank in range(size)]
    expected = [filled_layers(rank) for rank in range(size)]
    for copy in plan:
        for number, group in enumerate(GROUP_OF):
            source, destination = expected[copy.source][number], expected[copy.destination][number]
            a, b = copy.source_slots[group] * BLOCK, copy.destination_slots[group] * BLOCK
            destination.k_KPD[:, b:b + BLOCK] = source.k_KPD[:, a:a + BLOCK]
            destination.v_KPD[:, b:b + BLOCK] = source.v_KPD[:, a:a + BLOCK]

    def work(ring: ThreadRing) -> torch.Tensor:
        copy_blocks(plan, caches[ring.rank], GROUP_OF, BLOCK, most, ring)  # type: ignore[arg-type]
        return torch.empty(0)

    _, rings = run_ring(size, work)
    for found, due in zip(caches, expected):
        for layer, wanted in zip(found, due):
            assert torch.equal(layer.k_KPD, wanted.k_KPD) and torch.equal(layer.v_KPD, wanted.v_KPD)
    block_bytes = sum(layer.token_bytes for layer in caches[0]) * BLOCK
    for rank, ring in enumerate(rings):
        assert ring.bytes_sent == [block_bytes * sum((c.source, c.destination) == (rank, to) for c in plan)
                                   for to in range(size)]


@pytest.mark.parametrize("wrong", [
    [BlockCopy(0, 0, [1], [2])],
    [BlockCopy(0, 1, [1], [5]), BlockCopy(0, 1, [2], [5])],
    [BlockCopy(0, 1, [1], [5]), BlockCopy(1, 2, [5], [6])],
], ids=["to itself", "written twice", "read and written"])
def test_copies_that_depend_on_an_order_are_refused(wrong: list[BlockCopy]) -> None:
    with pytest.raises(AssertionError):
        plan_copies(0, 3, wrong, 8)
