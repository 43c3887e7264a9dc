"""How a plan is dealt to a dense operation and to Triton: long runs before all rows to the one, the rest to the other,
each key to one of them."""

import pytest
import torch
from ringserve_kernels import TILES, AttentionSpec, plan_attention
from ringserve_kernels.gpu import layout
from ringserve_kernels.gpu.dense import DenseOperation
from ringserve_kernels.gpu.layout import PagedLayout
from ringserve_kernels.triton.arguments import INTERPRETED
from torch import Tensor

from tests.kernels.backends import CPU_FLASH, Backend
from tests.kernels.bounds import assert_close
from tests.kernels.shards import Batch, Shards, make_spec

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here, and the tensors are the CPU's")


class Calls:
    """A dense operation that remembers its shapes."""

    def __init__(self, fixed_shapes: bool = False) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.operation = DenseOperation("counting", self._run, "torch", "torch", (0, 0), fixed_shapes=fixed_shapes)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        self.shapes.append((q.shape[2], k.shape[2]))
        return CPU_FLASH.run(q, k, v, scale)

    def backend(self) -> Backend:
        return Backend("counting", lambda dtype, block: PagedLayout(block, self.operation), slow=True)


def test_long_runs_go_to_the_dense_operation_and_the_rest_to_triton() -> None:
    calls = Calls()
    shards = Shards(Batch(lengths=((1230, 70), (20, 3), (700, 1)), scatter=False), make_spec(kv_heads=1, group=2),
                    calls.backend())
    state = shards.attend(0)
    assert_close(state, shards.expected(), torch.float32)
    assert calls.shapes == [(140, 1216)]  # 76 blocks of 16 end before the first row; one row of 700 is a decode step
    plan = plan_attention(shards.rows, [(s.span, s.blocks[0]) for s in shards.sequences], None)
    runs, left = plan.without_runs(32)
    assert [run.key_stop - run.key_start for run in runs] == [1216]
    assert sum(blocks.tokens for _, blocks in left.sequences) == 1300 - 1216 + 23 + 701


def test_keys_lie_as_for_torch_whatever_stands_beside_triton() -> None:
    layouts = [PagedLayout(64), PagedLayout(64, CPU_FLASH)]
    assert [layout.name for layout in layouts] == ["triton", "cpu-flash and triton"]
    assert {layout.order for layout in layouts} == {TILES.order}


def test_windows_that_end_within_a_past_leave_it_to_triton() -> None:
    calls = Calls()
    shards = Shards(Batch(lengths=((900, 66),), scatter=False), make_spec(kv_heads=1, group=1, window=950),
                    calls.backend())
    assert_close(shards.attend(0), shards.expected(), torch.float32)
    assert not calls.shapes


def test_an_operation_that_plans_for_each_shape_sees_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, others = Calls(fixed_shapes=True), Calls()
    monkeypatch.setattr(layout, "TORCH_FLASH", others.operation)
    shards = Shards(Batch(lengths=((1900, 70),), scatter=False), make_spec(kv_heads=1, group=1), calls.backend())
    assert_close(shards.attend(0), shards.expected(), torch.float32)
    assert calls.shapes == [(256, 1024), (256, 512)]
    assert others.shapes == [(70, 1888 - 1536)]


@pytest.mark.parametrize("spec, dtype, block, dense, reason", [
    (make_spec(dim=32), torch.float64, 64, False, "no queries in float64"),
    (make_spec(dim=512), torch.float16, 64, False, "head dims up to 256, not 512"),
    (make_spec(dim=32), torch.float16, 8, False, "blocks of"),
    (make_spec(dim=256, group=80), torch.float16, 64, False, "up to 64 query heads on a kv head, not 80"),
    (make_spec(dim=32, softcap=5.0), torch.float16, 64, True, "no soft caps"),
    (make_spec(dim=32, value_dim=16), torch.float16, 64, True, "of one width"),
    (make_spec(dim=32), torch.float32, 64, True, "16-bit numbers")])
def test_refusals(spec: AttentionSpec, dtype: torch.dtype, block: int, dense: bool, reason: str) -> None:
    refusal = PagedLayout.refusal(spec, dtype, block, dense, quantized=False)
    assert refusal is not None and reason in refusal


def test_quantized_keys_are_tritons_alone() -> None:
    spec = make_spec(dim=64)
    for dense, quantized in ((True, False), (False, False), (False, True)):
        assert PagedLayout.refusal(spec, torch.float16, 64, dense, quantized) is None
    assert PagedLayout.refusal(spec, torch.float16, 64, True, True) == "no quantized keys"
