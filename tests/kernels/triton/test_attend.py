"""`triton_attend` against the fp64 oracle: shapes of batch, head and shard, in storage that is NaN elsewhere.

bf16 is computed in fp32 by the interpreter (its bf16 products are garbage), on a GPU in bf16.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import AttentionSpec, KeyBlocks, RowSpan, merge_sink, reference_attention
from ringserve_kernels.triton import page_table, triton_attend

from tests.kernels.bounds import assert_close
from tests.kernels.shards import Batch, batches, make_spec, specs
from tests.kernels.triton.paged import DEVICE, PagedShards, on_host

FEW = settings(max_examples=8, deadline=None)


def paged(batch: Batch) -> Batch:
    """The same batch with a block size that the kernels take."""
    return Batch(batch.lengths, batch.shares, 16 if batch.block < 16 else batch.block, batch.scatter,
                 batch.sparse_rows, batch.peak, batch.dtype, batch.seed)


@FEW
@given(batches().map(paged), specs())
def test_each_shard_gives_the_partial_over_its_own_keys(batch: Batch, spec: AttentionSpec) -> None:
    shards = PagedShards(batch, spec)
    for shard in range(batch.shards):
        assert_close(on_host(shards.attend_paged(shard)), shards.expected(shard), torch.float32)


@FEW
@given(batches().map(paged), specs())
def test_shards_attended_into_one_accumulator_equal_attention_over_everything(
        batch: Batch, spec: AttentionSpec) -> None:
    shards = PagedShards(batch, spec)
    assert_close(on_host(shards.attend_all_paged()), shards.expected(), torch.float32)


@pytest.mark.parametrize(("dim", "value_dim", "group", "block", "dtype"), [
    (64, None, 8, 16, torch.float32), (64, None, 8, 16, torch.float16), (64, None, 1, 64, torch.bfloat16),
    (80, None, 4, 64, torch.float32), (80, None, 4, 64, torch.bfloat16), (96, None, 1, 32, torch.float16),
    (128, None, 8, 128, torch.float32), (128, None, 4, 64, torch.float16), (128, None, 4, 64, torch.bfloat16),
    (256, None, 4, 256, torch.float32), (256, None, 1, 64, torch.float16),
    (64, 128, 4, 64, torch.float32), (128, 48, 1, 64, torch.float16), (64, None, 3, 64, torch.float32),
    (32, None, 71, 64, torch.float16)])
def test_heads_and_blocks_of_real_models(dim: int, value_dim: int | None, group: int, block: int,
                                         dtype: torch.dtype) -> None:
    batch = Batch(lengths=((130, 21), (0, 3), (300, 1)), peak=2.0, dtype=dtype, block=block)
    shards = PagedShards(batch, make_spec(kv_heads=1, group=group, dim=dim, value_dim=value_dim))
    assert_close(on_host(shards.attend_paged()), shards.expected(), dtype)


@pytest.mark.parametrize(("window", "softcap", "dtype"), [
    (None, None, torch.float32), (1, None, torch.float32), (100, 30.0, torch.float16), (5000, None, torch.float16)])
def test_long_chunks_take_wide_tiles(window: int | None, softcap: float | None, dtype: torch.dtype) -> None:
    """They go on from the accumulators without scratch: the second shard does."""
    batch = Batch(lengths=((200, 140), (0, 150)), shares=(1, 1), block=64, dtype=dtype)
    shards = PagedShards(batch, make_spec(kv_heads=1, group=4, dim=32, window=window, softcap=softcap))
    assert [(tiles.tile_rows, tiles.split) for tiles in shards.table().tiles] == [(128, False)]
    assert_close(on_host(shards.attend_all_paged()), shards.expected(), dtype)


@pytest.mark.parametrize("window", [None, 700])
def test_a_split_sequence_merges_its_pieces(window: int | None) -> None:
    batch = Batch(lengths=((1700, 1), (40, 1), (1300, 9)), block=64)
    shards = PagedShards(batch, make_spec(kv_heads=1, group=4, dim=32, window=window))
    assert sorted(set(shards.table().reduction_RF[:, 3].tolist())) == ([1, 3, 4] if window is None else [1, 2])
    assert_close(on_host(shards.attend_all_paged()), shards.expected(), torch.float32)


def test_a_row_does_not_depend_on_its_batch() -> None:
    batch = Batch(lengths=((1200, 1), (40, 140), (3, 1), (700, 9)), block=16)
    shards = PagedShards(batch, make_spec(kv_heads=1, group=4, dim=32))
    o, lse = shards.attend_paged()
    for number, sequence in enumerate(shards.sequences):
        rows = slice(sequence.span.start, sequence.span.start + len(sequence.span.index))
        alone_o, alone_lse = shards.attend_paged(only=number)
        assert torch.equal(alone_o[rows], o[rows])
        assert torch.equal(alone_lse[rows], lse[rows])


def test_a_shard_without_keys_leaves_the_accumulators_alone() -> None:
    shards = PagedShards(Batch(lengths=((20, 3), (5, 1)), shares=(1, 0)), make_spec())
    o, lse = shards.attend_paged(1)
    assert torch.all(o == 0) and torch.all(lse == -torch.inf)
    state = shards.attend_paged(0)
    before = state[0].clone(), state[1].clone()
    assert shards.attend_paged(1, into=state) is state
    assert all(torch.equal(a, b) for a, b in zip(state, before))


@pytest.mark.parametrize("rows", [1, 200])
def test_rows_that_see_nothing_of_the_shard_are_the_identity(rows: int) -> None:
    """The shard holds only blocks after the first rows: holes before them are elsewhere."""
    spec = make_spec(kv_heads=1, group=4, dim=32)
    index = np.arange(rows)
    blocks = KeyBlocks(np.array([64, 128]), np.array([64, 9]), np.array([0, 64]))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator).to(DEVICE)
               for shape in ((rows, 4, 32), (1, 73, 32), (1, 73, 32)))
    table = page_table(rows, [(RowSpan(0, index), blocks)], spec, 64, DEVICE)
    o, lse = triton_attend(q, k, v, table, spec)
    assert torch.equal((lse == -torch.inf).all(1).cpu(), torch.from_numpy(index < 64))
    assert torch.all(o[:64] == 0)
    assert not o.isnan().any()


@pytest.mark.parametrize("lengths", [((0, 1),), ((15, 1),), ((16, 1),), ((0, 17),)])
def test_one_row_and_edges_of_a_block(lengths: tuple[tuple[int, int], ...]) -> None:
    shards = PagedShards(Batch(lengths=lengths, block=16), make_spec())
    assert_close(on_host(shards.attend_paged()), shards.expected(), torch.float32)


@FEW
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 40]))
def test_blocks_that_are_not_full_anywhere(seed: int, window: int | None) -> None:
    """Not only the last block of a sequence may have fewer keys than fit: holes in the middle are never read."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 17, size=12)
    first = np.arange(12) * 16
    blocks = KeyBlocks(first, length, rng.permutation(12) * 16)
    index, offset = blocks.keys()
    spec = make_spec(kv_heads=1, group=2, dim=16, window=window)
    shards = PagedShards(Batch(lengths=((192, 0), (150, 40)), block=16), spec)
    sequence = shards.sequences[1]
    k, v = (torch.full((1, 192, 16), torch.nan) for _ in range(2))
    k[:, offset], v[:, offset] = (x[index % 190].transpose(0, 1) for x in (sequence.k_SKD, sequence.v_SKD))
    rows = RowSpan(0, np.arange(150, 190))
    table = page_table(40, [(rows, blocks)], spec, 16, DEVICE)
    actual = triton_attend(shards.q_THD.to(DEVICE), k.to(DEVICE), v.to(DEVICE), table, spec)
    expected = reference_attention(shards.q_THD, k[:, offset].transpose(0, 1), v[:, offset].transpose(0, 1),
                                   torch.from_numpy(rows.index), torch.from_numpy(index), spec)
    assert_close(on_host(actual), expected, torch.float32)


def test_values_of_one_give_one() -> None:
    shards = PagedShards(Batch(lengths=((600, 1), (70, 140)), shares=(2, 1)), make_spec(group=4))
    for store in shards.stores:
        store.v_KPD[~store.v_KPD.isnan()] = 1.0
    o, _ = shards.attend_all_paged()
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=2e-6)


def test_a_nan_among_the_keys_is_not_hidden() -> None:
    shards = PagedShards(Batch(lengths=((20, 1), (20, 1))), make_spec())
    shards.stores[0].k_KPD[:, shards.sequences[0].blocks[0].offset[0]] = torch.nan
    o, lse = shards.attend_paged()
    assert o[0].isnan().all() and lse[0].isnan().all()
    assert not o[1].isnan().any()


def test_strided_storage_and_queries() -> None:
    """A layer's part of a larger pool, and queries that are part of a fused projection."""
    shards = PagedShards(Batch(lengths=((100, 5),)), make_spec())
    store, (rows, heads, dim) = shards.stores[0], shards.q_THD.shape
    pool = torch.full((2, 3, *store.k_KPD.shape), torch.nan)
    pool[0, 1], pool[1, 1] = store.k_KPD, store.v_KPD
    fused = torch.full((rows, heads + 4, dim), torch.nan)
    fused[:, :heads] = shards.q_THD
    pool, fused = pool.transpose(2, 3).contiguous().transpose(2, 3).to(DEVICE), fused.to(DEVICE)
    state = triton_attend(fused[:, :heads], pool[0, 1], pool[1, 1], shards.table(), shards.spec)
    assert_close(on_host(state), shards.expected(), torch.float32)


def test_sinks_join_afterwards() -> None:
    shards = PagedShards(Batch(lengths=((100, 5),)), make_spec())
    sink_H = torch.linspace(-3.0, 4.0, shards.spec.num_heads)
    state = on_host(shards.attend_paged())
    merge_sink(*state, sink_H)
    assert_close(state, shards.expected(sink_H=sink_H), torch.float32)


def test_no_rows_at_all() -> None:
    spec = make_spec()
    table = page_table(0, [], spec, 64, DEVICE)
    storage = torch.full((2, 64, 32), torch.nan, device=DEVICE)
    o, lse = triton_attend(torch.empty(0, 4, 32, device=DEVICE), storage, storage, table, spec)
    assert o.shape == (0, 4, 32) and lse.shape == (0, 4)
