"""What a rank remembers between plans, against ranks that keep everything in plain sets."""

from array import array

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ringserve.model.tables import RequestTable, StepRows, Tables
from ringserve.plan import BlocksDealt, NewRequest, ScheduledRows, SchedulerOutput, TokensKnown, pack_ids
from ringserve.sampling_params import SamplingParams
from tests.ringserve.fake_ranks import Driven, FakeTable, layer_group

GROUPS = [layer_group(), layer_group(window=6)]


def place_of(table: FakeTable, position: int, group: int, block: int) -> tuple[int, int]:
    """(holder, offset in its storage) of one token."""
    holder, slots = table.blocks[position // block]
    return holder, slots[group] * block + position % block


def assert_rows(rows: StepRows, plan: SchedulerOutput, driven: Driven, rank: int) -> None:
    """The rank's inputs, token by token."""
    block, expected = driven.block, []
    for scheduled in plan.rows:
        table = driven.ranks.tables[scheduled.handle]
        expected += [(table, position) for start, stop in scheduled.spans for position in range(start, stop)
                     if place_of(table, position, 0, block)[0] == rank]
    assert rows.token_ids.tolist() == [table.token_ids[position] for table, position in expected]
    assert rows.positions.tolist() == [position for _, position in expected]
    for group in range(len(GROUPS)):
        assert rows.write_at[group].tolist() == [
            place_of(table, position, group, block)[1] for table, position in expected]
    last = {s.handle: s.spans[-1][1] - 1 for s in plan.rows if s.sample}
    assert [(s.handle, s.position, s.sample) for s in rows.samples] == [
        (handle, position, True) for handle, position in last.items()
        if place_of(driven.ranks.tables[handle], position, 0, block)[0] == rank]
    for sample in rows.samples:
        assert rows.positions[sample.row] == sample.position


def assert_sequences(rows: StepRows, plan: SchedulerOutput, driven: Driven, me: int) -> None:
    """Rows and computed keys of all ranks, which every rank that holds a block of the request must see alike."""
    concerned = [s for s in plan.rows if any(holder == me for holder, _ in driven.ranks.tables[s.handle].blocks)]
    for group in range(len(GROUPS)):
        start = 0
        for scheduled, sequence in zip(concerned, rows.sequences[group], strict=True):
            table = driven.ranks.tables[scheduled.handle]
            assert sequence.pass_q == (scheduled.modes[group] == "pass-q")
            positions = [p for start, stop in scheduled.spans for p in range(start, stop)]
            for rank in range(driven.pool.ring_size):
                def held(positions: list[int], rank: int = rank, table: FakeTable = table) -> list[int]:
                    return [p for p in positions if place_of(table, p, 0, driven.block)[0] == rank]

                span, keys = sequence.spans[rank], sequence.keys[rank]
                assert span.index.tolist() == held(positions)
                if rank == me:
                    assert span.start == start
                    start += len(span.index)
                index, offset = keys.keys()
                assert index.tolist() == held(sorted(table.computed))
                assert offset.tolist() == [place_of(table, p, group, driven.block)[1] for p in index.tolist()]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), ring=st.integers(1, 3),
       block=st.integers(1, 5), chunk=st.integers(8, 30), slots=st.integers(10, 20),
       width=st.integers(1, 3), lazy=st.booleans())
def test_tables_follow_the_plans(lengths: list[int], ring: int, block: int, chunk: int, slots: int, width: int,
                                 lazy: bool) -> None:
    """Chunks, decoding, parking and return, on some of the ranks or all: in a pool that is often too small. A rank may
    hear later of what had nothing to do for it."""
    driven = Driven(ring=ring, block=block, chunk=chunk, slots=slots, reserve=1, groups=GROUPS, width=width)
    for number, length in enumerate(lengths):
        length = min(length, driven.capacity - 12)
        if length > 0:
            driven.add(f"r{number}", [(7 * i + number) % 20 for i in range(length)], max_tokens=12)
    tables = [Tables(rank, ring, len(GROUPS), block) for rank in range(ring)]
    while driven.scheduler.has_work:
        plan = driven.step()
        for rank in range(ring):
            involved = any(holder == rank for s in plan.rows for holder, _ in driven.ranks.tables[s.handle].blocks)
            if lazy and not involved:
                tables[rank].absorb(plan)
                continue
            rows = tables[rank].apply(plan)
            assert_rows(rows, plan, driven, rank)
            assert_sequences(rows, plan, driven, rank)


def test_wanted_logits_are_rows_of_the_rank_that_holds_them() -> None:
    driven = Driven(ring=2, block=4, groups=GROUPS)
    driven.add("a", range(12))
    plan = driven.step()
    [rows] = plan.rows
    plan = msgspec.structs.replace(plan, rows=[msgspec.structs.replace(rows, logits_at=[3, 5, 9])])
    wanted = [[(s.position, s.row, s.sample) for s in Tables(rank, 2, 2, 4).apply(plan).samples] for rank in range(2)]
    assert wanted == [[(3, 3, False), (9, 5, False), (11, 7, True)], [(5, 1, False)]]


def test_a_step_without_rows_lays_out_nothing() -> None:
    rows = Tables(0, 2, 2, 4).apply(SchedulerOutput(epoch=0, step=1))
    assert len(rows.token_ids) == len(rows.positions) == 0
    assert rows.sequences == [[], []] and rows.samples == []
    assert all(len(offsets) == 0 for offsets in rows.write_at)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_a_table_grows_by_any_steps(steps: list[int]) -> None:
    table = RequestTable(NewRequest(1, SamplingParams(), 0, (), 1), groups=2)
    tokens: list[int] = []
    blocks: list[int] = []
    for step in steps:
        new = list(range(len(tokens), len(tokens) + step))
        table.know(TokensKnown(1, len(tokens), pack_ids(array("I", new))))
        tokens += new
        dealt = list(range(len(blocks), len(blocks) + step))
        table.deal(BlocksDealt(1, len(blocks), [b % 3 for b in dealt], [dealt, [b + 1 for b in dealt]], [0] * step))
        blocks += dealt
    assert table.token_ids[:table.num_tokens].tolist() == tokens
    assert table.holders[:table.num_blocks].tolist() == [b % 3 for b in blocks]
    assert table.slots[1][:table.num_blocks].tolist() == [b + 1 for b in blocks]
    assert not table.computed[:table.num_blocks].any()


def test_blocks_dealt_again_are_missing_again() -> None:
    """What a survivor does when a lost block finds a new holder."""
    table = RequestTable(NewRequest(1, SamplingParams(), 0, (), 1), groups=1)
    table.deal(BlocksDealt(1, 0, [0, 1, 0], [[0, 0, 1]], [0] * 3))
    table.mark_computed(np.arange(12), 4)
    table.deal(BlocksDealt(1, 1, [2], [[7]], [0]))
    assert table.keys(0, 0, 4).first.tolist() == [0, 8]
    assert len(table.keys(1, 0, 4)) == len(table.keys(2, 0, 4)) == 0
    table.mark_computed(np.array([4, 5]), 4)
    assert table.keys(2, 0, 4).keys()[1].tolist() == [28, 29]


def assert_keys_are_those_of_a_scan(table: RequestTable, rank: int, block: int) -> None:
    """Block by block, from the columns of the table alone."""
    held = [b for b in range(table.num_blocks) if table.holders[b] == rank and table.computed[b]]
    for group in range(table.groups):
        keys = table.keys(rank, group, block)
        assert keys.first.tolist() == [b * block for b in held]
        assert keys.length.tolist() == [table.computed[b] for b in held]
        assert keys.offset.tolist() == [table.slots[group][b] * block for b in held]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 5))
def test_keys_that_are_kept_are_those_of_a_scan(data: st.DataObject, ring: int, block: int) -> None:
    """Blocks begun and completed in any order, dealt anew, dealt with keys; ranks asked for now and then."""
    table = RequestTable(NewRequest(1, SamplingParams(), 0, (), 1), groups=2)
    for step in range(data.draw(st.integers(1, 12), label="steps")):
        if step == 0 or data.draw(st.booleans(), label="deal"):
            start = data.draw(st.integers(0, table.num_blocks), label="start")
            count = data.draw(st.integers(1, 20), label="blocks")
            holders, computed = (data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
                                 for most in (ring - 1, data.draw(st.sampled_from([0, block]))))
            table.deal(BlocksDealt(1, start, holders, [list(range(n, n + count)) for n in (step, 50 * step)], computed))
        else:
            positions = data.draw(st.sets(st.integers(0, table.num_blocks * block - 1), min_size=1), label="positions")
            before = [table.keys(rank, 0, block) for rank in range(ring)]
            lengths = [keys.length.tolist() for keys in before]
            table.mark_computed(np.array(sorted(positions)), block)
            assert [keys.length.tolist() for keys in before] == lengths, "a plan in use was changed"
        for rank in data.draw(st.sets(st.integers(0, ring - 1)), label="asked"):
            assert_keys_are_those_of_a_scan(table, rank, block)
    for rank in range(ring):
        assert_keys_are_those_of_a_scan(table, rank, block)


def test_two_requests_may_name_the_same_slots() -> None:
    """A prefix that is shared: each reads it, each goes on in blocks of its own, one may end before the other."""
    def rows(handle: int, start: int, stop: int) -> ScheduledRows:
        return ScheduledRows(handle, [(start, stop)], ["pass-kv"], sample=False)

    tables = Tables(0, 2, 1, 4)
    tables.apply(SchedulerOutput(
        epoch=0, step=1, new=[NewRequest(handle, SamplingParams(), 0, (), 12) for handle in (1, 2)],
        tokens=[TokensKnown(handle, 0, pack_ids(array("I", range(12)))) for handle in (1, 2)],
        blocks=[BlocksDealt(1, 0, [0, 0, 0], [[5, 2, 3]], [0] * 3)], rows=[rows(1, 0, 8)]))
    both = tables.apply(SchedulerOutput(epoch=0, step=2, blocks=[BlocksDealt(2, 0, [0, 0, 0], [[5, 2, 9]], [4, 4, 0])],
                                        rows=[rows(1, 8, 10), rows(2, 8, 12)]))
    assert [s.keys[0].offset.tolist() for s in both.sequences[0]] == [[20, 8, 12], [20, 8, 36]]
    assert both.write_at[0].tolist() == [12, 13, 36, 37, 38, 39]
    last = tables.apply(SchedulerOutput(epoch=0, step=3, released=[2], rows=[rows(1, 10, 12)]))
    assert last.sequences[0][0].keys[0].keys()[1].tolist() == [20, 21, 22, 23, 8, 9, 10, 11, 12, 13, 14, 15]
