"""How `attend` uses torch's operations: which tiles it makes of runs and fragments, and fp64. What it computes is the
conformance suite's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import backend, plan_attention
from ringserve_kernels.attention_plan import DENSE_KEYS, TILE_ROWS

from tests.kernels.backends import TORCH
from tests.kernels.bounds import assert_close
from tests.kernels.shards import Batch, Shards, cases, make_spec

CPU = torch.device("cpu")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_fp64_computes_in_fp64(data: st.DataObject) -> None:
    shards = Shards(*data.draw(cases(TORCH, torch.float64)))
    assert_close(shards.attend_all(), shards.expected(), torch.float64)


def test_what_the_flash_operation_cannot_take_goes_through_plain_ones() -> None:
    assert backend(make_spec(dim=64), CPU, torch.bfloat16, masked=False) == "torch-cpu-flash"
    assert backend(make_spec(dim=64, value_dim=48), CPU, torch.bfloat16, masked=False) == "torch-math"
    assert backend(make_spec(softcap=5.0), CPU, torch.bfloat16, masked=False) == "torch-math"


LONG = 2 * DENSE_KEYS + 76


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("new", [1, 40, TILE_ROWS + 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_runs_and_fragments_give_the_same(scatter: bool, new: int, dtype: torch.dtype) -> None:
    batch = Batch(lengths=((LONG, new), (5, 1)), scatter=scatter, peak=4.0, dtype=dtype)
    shards = Shards(batch, make_spec())
    s = shards.sequences[0]
    plan = plan_attention(shards.rows, [(s.span, s.blocks[0])], None)
    assert bool(plan.tiles.dense) is not scatter
    assert_close(shards.attend_all(), shards.expected(), dtype)


def test_adjacent_slots_are_attended_without_gathering() -> None:
    shards = Shards(Batch(lengths=((LONG + 12, 1),), scatter=False), make_spec())
    s = shards.sequences[0]
    plan = plan_attention(1, [(s.span, s.blocks[0])], None)
    assert [(tile.key_start, tile.key_stop) for tile in plan.tiles.dense] == [(0, s.tokens)]
    assert not plan.tiles.gathered
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


def test_many_short_sequences_cost_few_calls() -> None:
    shards = Shards(Batch(lengths=((20, 1), (30, 1), (27, 1), (31, 1)) * 8), make_spec())
    plan = plan_attention(shards.rows, [(s.span, s.blocks[0]) for s in shards.sequences], None)
    assert len(plan.tiles.gathered) == 1
    assert_close(shards.attend_all(), shards.expected(), torch.float32)
