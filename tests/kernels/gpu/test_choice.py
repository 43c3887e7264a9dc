"""What is chosen on a GPU, and said; with the CPU in the GPU's place, where Triton interprets its kernels. That the
chosen layouts compute the right thing is the conformance suite's."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ringserve_kernels import TILES, KernelUnavailable, race
from ringserve_kernels.choice import Wanted
from ringserve_kernels.gpu import choice
from ringserve_kernels.gpu.dense import OPERATIONS, DenseOperation
from ringserve_kernels.gpu.layout import PagedLayout
from ringserve_kernels.triton.arguments import INTERPRETED
from torch import Tensor

from tests.kernels.backends import CPU_FLASH
from tests.kernels.shards import make_spec

CPU = torch.device("cpu")
SPEC = make_spec(kv_heads=1, group=2, dim=16)
SM_90 = (9, 0)
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here, and the tensors are the CPU's")


def broken(*_: object) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def wrong(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = CPU_FLASH.run(q, k, v, scale)
    return o, lse / 0.6931


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two that work, one that fails, one that gives base-2 lse, and those that are not installed."""
    named = {op.name: op for op in OPERATIONS}
    monkeypatch.setattr(choice, "OPERATIONS", (
        replace(named["cudnn"], run=CPU_FLASH.run), named["fa2"], replace(named["fa3"], before=(9, 0)),
        DenseOperation("fa4", broken, "torch", "torch", (8, 0)),
        DenseOperation("efficient", wrong, "torch", "torch", (8, 0)),
        DenseOperation("flash", CPU_FLASH.run, "torch", "torch", (8, 0))))
    monkeypatch.setattr("ringserve_kernels.gpu.layout.TORCH_FLASH", CPU_FLASH)
    monkeypatch.setattr(race, "cache_directory", lambda: tmp_path)


def choose(wanted: Wanted = "auto", dtype: torch.dtype = torch.float16, block: int = 64,
           quantized: bool = False) -> choice.Choice:
    return choice.choose_on_gpu(SPEC, dtype, CPU, block, wanted, quantized, SM_90)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The race's result instead of a race."""
    seconds = {"triton": 3.0, "cudnn": 1.0, "flash": 1.5}
    monkeypatch.setattr(choice, "race", lambda contenders, *_: {
        name: [seconds[name.split()[0]]] for name in contenders})
    return seconds


def test_the_fastest_that_is_right_is_taken_and_all_others_named(times: dict[str, float]) -> None:
    chosen = choose()
    assert isinstance(chosen.layout, PagedLayout) and chosen.layout.dense is not None
    assert chosen.layout.name == "cudnn and triton"
    words = chosen.words
    assert words.startswith("cudnn and triton (3 times as fast as triton; 1.5 times as fast as flash and triton; ")
    assert "fa2: flash-attn is not installed" in words and "fa3: needs sm_90 and before sm_90" in words
    assert "fa4: it fails here: RuntimeError: no kernel image is available" in words and "execution" not in words
    assert "efficient: it is wrong here" in words
    times["triton"] = 0.5
    assert choose().words.startswith("triton (2 times as fast as cudnn and triton; 3 times")


def test_what_is_asked_for_is_taken_or_refused_with_its_reason() -> None:
    assert choose("triton").words == "triton (as asked for)"
    assert choose("flash").words == "flash (as asked for)"
    for wanted, reason in (("fa2", "not installed"), ("fa4", "no kernel image"), ("efficient", "wrong here"),
                           ("native", "for CPUs")):
        with pytest.raises(KernelUnavailable, match=reason):
            choose(wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype, block, reason", [
    (torch.float64, 64, "no queries in float64"), (torch.float16, 48, "blocks of 16, 32, 64, 128, 256 tokens, not 48")])
def test_what_triton_cannot_take_goes_to_torch(dtype: torch.dtype, block: int, reason: str) -> None:
    chosen = choose(dtype=dtype, block=block)
    assert chosen.layout is TILES and reason in chosen.words


def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ringserve_kernels.gpu.layout", None)
    chosen = choose()
    assert chosen.layout is TILES and "pip install 'ringserve[triton]'" in chosen.words
    with pytest.raises(KernelUnavailable, match="Triton is not installed"):
        choose("triton")


def test_dense_operations_get_16_bit_numbers_only(times: dict[str, float]) -> None:
    chosen = choose(dtype=torch.float32)
    assert chosen.layout.name == "triton" and "16-bit numbers, not float32" in chosen.words


def test_what_quantized_keys_leave_no_use_for_is_refused(times: dict[str, float]) -> None:
    assert choose(quantized=True).layout.name == "triton"
    with pytest.raises(KernelUnavailable, match="no quantized keys"):
        choose("cudnn", quantized=True)


def test_a_race_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "ROUNDS", 1)
    monkeypatch.setattr(choice, "CHECKED", ((40, 560),))
    def raced() -> str:
        return choice.choose_on_gpu(SPEC, torch.float16, CPU, 64, "auto", capability=SM_90, chunk=(40, 560)).words

    words = raced()
    assert "times as fast as" in words
    monkeypatch.setattr(race, "_seconds", None)
    assert raced() == words
