"""`attend` against the fp64 oracle: all shapes of batch, head and shard, in storage that is NaN elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import AttentionSpec, attend, backend, merge_sink, plan_attention
from ringserve_kernels.attention_plan import DENSE_KEYS, TILE_ROWS

from tests.kernels.bounds import assert_close, relative_rms
from tests.kernels.shards import Batch, Shards, batches, make_spec, specs

QUICK = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=30, deadline=None)
CPU = torch.device("cpu")


@QUICK
@given(batches(), specs())
def test_merged_shards_equal_attention_over_everything(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@QUICK
@given(batches(), specs())
def test_each_shard_gives_the_partial_over_its_own_keys(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    for shard in range(batch.shards):
        assert_close(shards.attend(shard), shards.expected(shard), torch.float32)


@FEW
@given(batches(), specs())
def test_attending_into_an_accumulator_equals_merging(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    state = shards.attend(0)
    for shard in range(1, batch.shards):
        assert shards.attend(shard, into=state) is state
    assert_close(state, shards.expected(), torch.float32)


@FEW
@given(batches(torch.bfloat16), specs())
def test_bf16_stays_within_its_bound(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    assert_close(shards.attend_all(), shards.expected(), torch.bfloat16)


@FEW
@given(batches(torch.float64), specs())
def test_fp64_computes_in_fp64(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    assert_close(shards.attend_all(), shards.expected(), torch.float64)


@FEW
@given(batches(), specs())
def test_sinks_join_the_softmax_once(batch: Batch, spec: AttentionSpec) -> None:
    shards = Shards(batch, spec)
    sink_H = torch.linspace(-3.0, 4.0, spec.num_heads)
    state = shards.attend_all()
    merge_sink(*state, sink_H)
    assert_close(state, shards.expected(sink_H=sink_H), torch.float32)


@QUICK
@given(batches(), specs())
def test_values_of_one_give_one(batch: Batch, spec: AttentionSpec) -> None:
    """To the last bits: a tile adds up its weights and its sum in different orders. Merging adds nothing."""
    o_THD, lse_TH = Shards(batch, spec).with_values(1.0).attend_all()
    assert torch.all(lse_TH > -torch.inf)
    torch.testing.assert_close(o_THD, torch.ones_like(o_THD), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims_and_groups_of_real_models(dim: int, group: int, dtype: torch.dtype) -> None:
    batch = Batch(lengths=((130, 33), (0, 20), (75, 1)), shares=(3, 1), peak=4.0, dtype=dtype)
    shards = Shards(batch, make_spec(kv_heads=2, group=group, dim=dim))
    assert_close(shards.attend_all(), shards.expected(), dtype)


@pytest.mark.parametrize("value_dim", [16, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_may_have_another_width_than_keys(value_dim: int, dtype: torch.dtype) -> None:
    spec = make_spec(kv_heads=1, group=4, dim=64, value_dim=value_dim)
    assert backend(spec, CPU, dtype, masked=False) == "torch-math"
    shards = Shards(Batch(lengths=((600, 40), (0, 3)), shares=(1, 2), dtype=dtype), spec)
    assert_close(shards.attend_all(), shards.expected(), dtype)


LONG = 2 * DENSE_KEYS + 76


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("new", [1, 40, TILE_ROWS + 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_runs_and_fragments_give_the_same(scatter: bool, new: int, dtype: torch.dtype) -> None:
    batch = Batch(lengths=((LONG, new), (5, 1)), scatter=scatter, peak=4.0, dtype=dtype)
    shards = Shards(batch, make_spec())
    s = shards.sequences[0]
    plan = plan_attention(shards.rows, [(s.span, s.blocks[0])], None)
    assert bool(plan.dense) is not scatter
    assert_close(shards.attend_all(), shards.expected(), dtype)


def test_adjacent_slots_are_attended_without_gathering() -> None:
    shards = Shards(Batch(lengths=((LONG + 12, 1),), scatter=False), make_spec())
    s = shards.sequences[0]
    plan = plan_attention(1, [(s.span, s.blocks[0])], None)
    assert [(tile.key_start, tile.key_stop) for tile in plan.dense] == [(0, s.tokens)]
    assert not plan.gathered
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


def test_many_short_sequences_cost_few_calls() -> None:
    shards = Shards(Batch(lengths=((20, 1), (30, 1), (27, 1), (31, 1)) * 8), make_spec())
    plan = plan_attention(shards.rows, [(s.span, s.blocks[0]) for s in shards.sequences], None)
    assert len(plan.gathered) == 1
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 600])
def test_windows_end_where_they_should(window: int) -> None:
    shards = Shards(Batch(lengths=((700, 140), (10, 1)), shares=(1, 1)), make_spec(window=window))
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcaps(softcap: float) -> None:
    shards = Shards(Batch(lengths=((200, 60),), shares=(1, 2), peak=4.0), make_spec(softcap=softcap))
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


def test_rows_before_every_key_of_a_shard_see_nothing() -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((0, 64),), scatter=False), spec)
    whole = shards.sequences[0]
    later = whole.blocks[0].take(slice(2, None))
    plan = plan_attention(64, [(whole.span, later)], None)
    o_THD, lse_TH = attend(shards.q_THD, shards.stores[0], plan, spec)
    assert torch.all(lse_TH[:32] == -torch.inf) and torch.all(o_THD[:32] == 0)
    assert torch.all(lse_TH[32:].isfinite())


def test_a_shard_without_keys_gives_the_identity() -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((30, 4),), shares=(1, 0)), spec)
    o_THD, lse_TH = shards.attend(1)
    assert torch.all(o_THD == 0) and torch.all(lse_TH == -torch.inf)
    assert o_THD.shape == (4, spec.num_heads, spec.value_dim)


def test_no_rows_at_all() -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((30, 4),)), spec)
    o_THD, lse_TH = attend(shards.q_THD[:0], shards.stores[0], plan_attention(0, [], None), spec)
    assert o_THD.shape == (0, spec.num_heads, spec.value_dim) and lse_TH.shape == (0, spec.num_heads)


def test_bf16_error_does_not_grow_with_the_number_of_shards() -> None:
    errors = []
    for shares in ((1,), (1,) * 16):
        shards = Shards(Batch(lengths=((1000, 64),), shares=shares, dtype=torch.bfloat16), make_spec(dim=64))
        errors.append(relative_rms(shards.attend_all()[0], shards.expected()[0]))
    assert errors[1] <= max(1.2 * errors[0], 1e-3) <= 2.5e-3


def test_equal_scores_average_the_values() -> None:
    """Golden: zero queries over 4 keys: lse = ln 4 = 1.386294 (2.0 would be base 2), o = the mean of V."""
    spec = make_spec(kv_heads=1, group=1, dim=16)
    shards = Shards(Batch(lengths=((3, 1),)), spec)
    shards.q_THD.zero_()
    o_THD, lse_TH = shards.attend_all()
    assert float(lse_TH) == pytest.approx(1.3862944, abs=1e-6)
    torch.testing.assert_close(o_THD[0, 0], shards.sequences[0].v_SKD.mean(0)[0])


def _off_by_one(spec: AttentionSpec) -> AttentionSpec:
    assert spec.window is not None
    return AttentionSpec(spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim, spec.scale,
                         window=spec.window + 1)


MUTANTS = ["base-2 lse", "block dropped", "block twice", "window off by one", "sink twice"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_bounds_catch_mutants(mutant: str) -> None:
    """What the checks above are worth: each of the classic mistakes fails them."""
    spec = make_spec(window=300)
    shards = Shards(Batch(lengths=((2000, 20),), shares=(1, 1, 1)), spec)
    sink_H = torch.full((spec.num_heads,), 2.0)
    expected = shards.expected(sink_H=sink_H if mutant == "sink twice" else None)
    if mutant == "block dropped":
        blocks = shards.sequences[0].blocks
        blocks[1] = blocks[1].take(slice(0, -1))
    state = shards.attend(0, spec=_off_by_one(spec) if mutant == "window off by one" else None)
    for shard in (1, 2, 2) if mutant == "block twice" else (1, 2):
        if mutant == "base-2 lse":
            state[1].div_(torch.log(torch.tensor(2.0)))
        shards.attend(shard, into=state)
    for _ in range(2 if mutant == "sink twice" else 0):
        merge_sink(*state, sink_H)
    with pytest.raises(AssertionError):
        assert_close(state, expected, torch.float32)


@FEW
@given(st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_what_stands_beside_them(seed: int) -> None:
    """A request's rows are the same whatever else is in the batch, up to rounding."""
    spec = make_spec()
    together = Shards(Batch(lengths=((90, 12), (40, 30)), seed=seed), spec)
    first = together.sequences[0]
    plan = plan_attention(12, [(first.span, first.blocks[0])], None)
    alone = attend(together.q_THD[:12], together.stores[0], plan, spec)
    torch.testing.assert_close(together.attend(0)[0][:12], alone[0], rtol=1e-5, atol=1e-6)
