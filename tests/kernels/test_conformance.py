"""The conformance suite: every backend against the fp64 oracle, in storage that is NaN wherever nothing was written.

Full, causal by index, ragged, one row, empty shards, windows, sinks, soft caps, head dims and groups of real models,
fp32, bf16 and quantized keys: a backend that passes may be put behind `attend`.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_kernels import (
    ArgumentError,
    AttentionSpec,
    KeyBlocks,
    KeyValues,
    RowSpan,
    attend,
    merge_sink,
    plan_attention,
)

from tests.kernels.backends import BACKENDS, DENSE, NATIVE, Backend
from tests.kernels.bounds import assert_close, relative_rms
from tests.kernels.shards import Batch, Shards, cases, make_spec

QUICK = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=30, deadline=None)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float32, torch.bfloat16]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@QUICK
@given(st.data())
def test_merged_shards_equal_attention_over_everything(backend: Backend, dtype: torch.dtype,
                                                       data: st.DataObject) -> None:
    batch, spec = data.draw(cases(backend, dtype))
    shards = Shards(batch, spec, backend)
    assert_close(shards.attend_all(), shards.expected(), dtype)


@every_backend
@QUICK
@given(st.data())
def test_each_shard_gives_the_partial_over_its_own_keys(backend: Backend, data: st.DataObject) -> None:
    shards = Shards(*data.draw(cases(backend)), backend)
    for shard in range(shards.batch.shards):
        assert_close(shards.attend(shard), shards.expected(shard), torch.float32)


@every_backend
@FEW
@given(st.data())
def test_attending_into_an_accumulator_equals_merging(backend: Backend, data: st.DataObject) -> None:
    shards = Shards(*data.draw(cases(backend)), backend)
    state = shards.attend(0)
    for shard in range(1, shards.batch.shards):
        assert shards.attend(shard, into=state) is state
    assert_close(state, shards.expected(), torch.float32)


@every_backend
@FEW
@given(st.data())
def test_sinks_join_the_softmax_once(backend: Backend, data: st.DataObject) -> None:
    shards = Shards(*data.draw(cases(backend)), backend)
    sink_H = torch.linspace(-3.0, 4.0, shards.spec.num_heads)
    state = shards.attend_all()
    merge_sink(*state, sink_H)
    assert_close(state, shards.expected(sink_H=sink_H), torch.float32)


@every_backend
@QUICK
@given(st.data())
def test_values_of_one_give_one(backend: Backend, data: st.DataObject) -> None:
    """To the last bits: a tile adds up its weights and its sum in different orders. Merging adds nothing."""
    o_THD, lse_TH = Shards(*data.draw(cases(backend)), backend).with_values(1.0).attend_all()
    assert torch.all(lse_TH > -torch.inf)
    torch.testing.assert_close(o_THD, torch.ones_like(o_THD), rtol=0, atol=2e-6)


@every_backend
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@FEW
@given(st.data())
def test_quantized_keys_are_read_exactly(backend: Backend, dtype: torch.dtype, stored: torch.dtype,
                                         data: st.DataObject) -> None:
    """Against the oracle over what the codes and scales say: what the format loses is another test's."""
    shards = Shards(*data.draw(cases(backend, dtype)), backend, stored)
    assert_close(shards.attend_all(), shards.expected(), dtype)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims_and_groups_of_real_models(backend: Backend, dim: int, group: int, dtype: torch.dtype) -> None:
    lengths = ((40, 9), (30, 1)) if backend.slow else ((130, 33), (0, 20), (75, 1))
    batch = Batch(lengths=lengths, shares=(3, 1), peak=4.0, dtype=dtype)
    shards = Shards(batch, make_spec(kv_heads=2, group=group, dim=dim), backend)
    assert_close(shards.attend_all(), shards.expected(), dtype)


@every_backend
@pytest.mark.parametrize("value_dim", [16, 48, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_may_have_another_width_than_keys(backend: Backend, value_dim: int, dtype: torch.dtype) -> None:
    spec = make_spec(kv_heads=1, group=4, dim=64, value_dim=value_dim)
    shards = Shards(Batch(lengths=((600, 40), (0, 3)), shares=(1, 2), dtype=dtype), spec, backend)
    assert_close(shards.attend_all(), shards.expected(), dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, DENSE])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("new", [1, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_pasts(backend: Backend, scatter: bool, new: int, dtype: torch.dtype) -> None:
    """Long enough for dense tiles, several chunks of keys and split keys, and for a block size that is not 64."""
    past, block = (1100, 32) if backend.slow else (9000, 48)
    batch = Batch(lengths=((past, new), (5, 1)), block=block, scatter=scatter, peak=4.0, dtype=dtype)
    shards = Shards(batch, make_spec(kv_heads=1, group=3), backend)
    assert_close(shards.attend_all(), shards.expected(), dtype)


@every_backend
def test_square_causal(backend: Backend) -> None:
    shards = Shards(Batch(lengths=((0, 200 if backend.slow else 700),), scatter=False), make_spec(), backend)
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@every_backend
@pytest.mark.parametrize("window", [1, 63, 64, 65, 600])
def test_windows_end_where_they_should(backend: Backend, window: int) -> None:
    rows = 20 if backend.slow else 140
    shards = Shards(Batch(lengths=((700, rows), (10, 1)), shares=(1, 1)), make_spec(window=window), backend)
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@every_backend
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcaps(backend: Backend, softcap: float) -> None:
    shards = Shards(Batch(lengths=((200, 60),), shares=(1, 2), peak=4.0), make_spec(softcap=softcap), backend)
    assert_close(shards.attend_all(), shards.expected(), torch.float32)


@every_backend
def test_rows_before_every_key_of_a_shard_see_nothing(backend: Backend) -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((0, 64),), scatter=False), spec, backend)
    whole = shards.sequences[0]
    later = whole.blocks[0].take(slice(2, None))
    plan = plan_attention(64, [(whole.span, later)], None)
    o_THD, lse_TH = attend(shards.q_THD, shards.stores[0], plan, spec)
    assert torch.all(lse_TH[:32] == -torch.inf) and torch.all(o_THD[:32] == 0)
    assert torch.all(lse_TH[32:].isfinite())


@every_backend
def test_a_shard_without_keys_gives_the_identity(backend: Backend) -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((30, 4),), shares=(1, 0)), spec, backend)
    o_THD, lse_TH = shards.attend(1)
    assert torch.all(o_THD == 0) and torch.all(lse_TH == -torch.inf)
    assert o_THD.shape == (4, spec.num_heads, spec.value_dim)


@every_backend
def test_no_rows_at_all(backend: Backend) -> None:
    spec = make_spec()
    shards = Shards(Batch(lengths=((30, 4),)), spec, backend)
    o_THD, lse_TH = attend(shards.q_THD[:0], shards.stores[0], plan_attention(0, [], None), spec)
    assert o_THD.shape == (0, spec.num_heads, spec.value_dim) and lse_TH.shape == (0, spec.num_heads)


@every_backend
def test_bf16_error_does_not_grow_with_the_number_of_shards(backend: Backend) -> None:
    errors = []
    for shares in ((1,), (1,) * 16):
        lengths = ((500, 8),) if backend.slow else ((1000, 64),)
        shards = Shards(Batch(lengths=lengths, shares=shares, dtype=torch.bfloat16), make_spec(dim=64), backend)
        errors.append(relative_rms(shards.attend_all()[0], shards.expected()[0]))
    assert errors[1] <= max(1.2 * errors[0], 1e-3) <= 2.5e-3


@every_backend
def test_equal_scores_average_the_values(backend: Backend) -> None:
    """Golden: zero queries over 4 keys: lse = ln 4 = 1.386294 (2.0 would be base 2), o = the mean of V."""
    spec = make_spec(kv_heads=1, group=1, dim=16)
    shards = Shards(Batch(lengths=((3, 1),)), spec, backend)
    shards.q_THD.zero_()
    o_THD, lse_TH = shards.attend_all()
    assert float(lse_TH) == pytest.approx(1.3862944, abs=1e-6)
    torch.testing.assert_close(o_THD[0, 0], shards.sequences[0].v_SKD.mean(0)[0])


@every_backend
def test_numbers_that_are_not_finite_are_seen(backend: Backend) -> None:
    """In every row that sees the key, and in no other sequence."""
    shards = Shards(Batch(lengths=((0, 96), (50, 20)), scatter=False), make_spec(kv_heads=1, group=1), backend)
    where = int(shards.sequences[0].blocks[0].offset[2] + 5)  # token 37
    bad = torch.full((1, 1, 32), torch.nan)
    shards.stores[0].write(bad, bad, torch.tensor([where]))
    o_THD, _ = shards.attend(0)
    assert not o_THD[37:96].isfinite().any()
    assert o_THD[96:].isfinite().all()


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


@every_backend
@FEW
@given(st.data())
def test_rows_do_not_depend_on_what_stands_beside_them(backend: Backend, data: st.DataObject) -> None:
    """A request's rows are the same whatever else is in the batch, up to rounding; to the bit in kernels of ours."""
    spec, seed = make_spec(), data.draw(st.integers(0, 2 if backend.slow else 2**32 - 1))
    together = Shards(Batch(lengths=((90, 12), (40, 30)), seed=seed), spec, backend)
    first = together.sequences[0]
    plan = plan_attention(12, [(first.span, first.blocks[0])], None)
    alone = attend(together.q_THD[:12], together.stores[0], plan, spec)
    torch.testing.assert_close(together.attend(0)[0][:12], alone[0], rtol=0 if backend.bitwise else 1e-5,
                               atol=0 if backend.bitwise else 1e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 40, 300])
def test_the_number_of_threads_changes_nothing(backend: Backend, new: int, dtype: torch.dtype) -> None:
    shards = Shards(Batch(lengths=((9000, new), (70, 5)), dtype=dtype), make_spec(), backend)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(shards.attend(0))
    torch.set_num_threads(1)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("backend", NATIVE)
def test_so_many_keys_that_their_pieces_grow(backend: Backend) -> None:
    """64 rows of 8 heads are one task; its partials are at most 16, so pieces of 70,000 keys are longer than 4,096."""
    batch, spec = Batch(lengths=((70_000, 64),), block=64, scatter=False), make_spec(kv_heads=1, group=8, dim=16)
    assert_close(Shards(batch, spec, backend).attend(0), Shards(batch, spec).attend(0), torch.float32)


class TestRefusals:
    """A typed error names the argument and what is allowed."""

    SPEC = make_spec()

    def _attend(self, backend: Backend, q: torch.Tensor | None = None, keys: KeyValues | None = None,
                blocks: KeyBlocks | None = None) -> None:
        shards = Shards(Batch(lengths=((20, 1),)), self.SPEC, backend)
        s = shards.sequences[0]
        plan = plan_attention(1, [(RowSpan(0, np.array([20])), blocks or s.blocks[0])], None)
        attend(shards.q_THD if q is None else q, keys or shards.stores[0], plan, self.SPEC)

    @every_backend
    def test_queries_of_another_shape(self, backend: Backend) -> None:
        with pytest.raises(ArgumentError, match=r"q_THD is \(1, 4, 16\); allowed: \(1, 4, 32\)"):
            self._attend(backend, torch.zeros(1, 4, 16))

    @every_backend
    def test_queries_of_another_dtype(self, backend: Backend) -> None:
        with pytest.raises(ArgumentError, match=r"bfloat16|float32"):
            self._attend(backend, torch.zeros(1, 4, 32, dtype=torch.bfloat16))

    @every_backend
    def test_keys_of_another_shape(self, backend: Backend) -> None:
        store = Shards(Batch(lengths=((20, 1),)), make_spec(kv_heads=4), backend).stores[0]
        with pytest.raises(ArgumentError, match=r"k_KPD is .*allowed: "):
            self._attend(backend, keys=store)

    @every_backend
    def test_keys_behind_the_storage(self, backend: Backend) -> None:
        blocks = KeyBlocks(np.array([0]), np.array([16]), np.array([1 << 20]))
        with pytest.raises(ArgumentError, match=r"k_KPD is of .* allowed: at least 1048592, as the plan reads"):
            self._attend(backend, blocks=blocks)

    @pytest.mark.parametrize("backend", NATIVE)
    @pytest.mark.parametrize(("offset", "length", "message"), [
        (8, 8, "offset is .*allowed: multiples"), (16, 17, "length is .*allowed: 1 to 16"),
        (16, 0, "length is .*allowed: 1 to 16")])
    def test_blocks_that_are_not_the_storages(self, backend: Backend, offset: int, length: int, message: str) -> None:
        blocks = KeyBlocks(np.array([0]), np.array([length]), np.array([offset]))
        with pytest.raises(ArgumentError, match=message):
            self._attend(backend, blocks=blocks)

    @pytest.mark.parametrize("backend", NATIVE)
    def test_rows_that_the_queries_do_not_have(self, backend: Backend) -> None:
        shards = Shards(Batch(lengths=((20, 1),)), self.SPEC, backend)
        plan = plan_attention(1, [(RowSpan(1, np.array([20])), shards.sequences[0].blocks[0])], None)
        with pytest.raises(ArgumentError, match="start is 1 of 1 rows; allowed: within the 1 rows of q"):
            attend(shards.q_THD, shards.stores[0], plan, self.SPEC)

    @every_backend
    @pytest.mark.parametrize(("o", "lse", "message"), [
        (torch.zeros(1, 4, 16), torch.zeros(1, 4), r"into\[0\] is \(1, 4, 16\); allowed: \(1, 4, 32\)"),
        (torch.zeros(1, 4, 32), torch.zeros(4), r"into\[1\] is \(4,\); allowed: \(1, 4\)"),
        (torch.zeros(1, 4, 32, dtype=torch.bfloat16), torch.zeros(1, 4), r"into\[0\] is torch.bfloat16; allowed: .*32"),
        (torch.zeros(1, 4, 64)[..., ::2], torch.zeros(1, 4), r"into\[0\] is strided by .* allowed: .* adjacent")])
    def test_accumulators_that_cannot_be(self, backend: Backend, o: torch.Tensor, lse: torch.Tensor,
                                         message: str) -> None:
        shards = Shards(Batch(lengths=((20, 1),)), self.SPEC, backend)
        with pytest.raises(ArgumentError, match=message):
            shards.attend(0, into=(o, lse))

    @every_backend
    @pytest.mark.parametrize("where", [-1, 1 << 20])
    def test_nothing_is_written_outside_the_storage(self, backend: Backend, where: int) -> None:
        store = Shards(Batch(lengths=((20, 1),)), self.SPEC, backend).stores[0]
        before = store.k_KPD.clone(), store.v_KPD.clone()
        new = torch.ones(store.k_KPD.shape[0], 2, 32)
        with pytest.raises((ArgumentError, IndexError)):
            store.write(new, new, torch.tensor([3, where]))
        if backend.native:
            assert all(torch.equal(x.nan_to_num(7), own.nan_to_num(7))
                       for x, own in zip(before, (store.k_KPD, store.v_KPD)))

    def test_tensors_that_are_no_storage(self) -> None:
        k, scale = torch.zeros(2, 64, 32), torch.zeros(2, 64)
        for arguments, message in [
                ((k[0], k[0]), r"k_KPD is \(64, 32\)"), ((k, k[:, :32]), r"v_KPD is \(2, 32, 32\)"),
                ((k, k.bfloat16()), "v_KPD is torch.bfloat16; allowed: k_KPD's, torch.float32"),
                ((k.to(torch.int8), k.to(torch.int8)), "k_KPD is torch.int8 without scales"),
                ((k, k, (scale, scale)), "k_KPD is torch.float32 with scales"),
                ((k.to(torch.int8), k.to(torch.int8), (scale, scale[:, :32])), r"scales_KP is \(2, 32\)")]:
            with pytest.raises(ArgumentError, match=message):
                KeyValues(*arguments)
