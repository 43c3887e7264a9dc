"""Which kernel serves: forced, raced, refused with a reason, never one that is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from ringserve_kernels import TILES, KernelUnavailable, Layout, NativeLayout, choice, race
from ringserve_kernels.native import build, variants

from ringserve.config import AttentionName
from tests.kernels.shards import make_spec

CPU = torch.device("cpu")
SPEC = make_spec(dim=64)
needs_variant = pytest.mark.skipif(not variants.runnable(), reason="this CPU has neither AVX2 nor AVX-512")


@pytest.fixture(autouse=True)
def fresh_kernels() -> Iterator[None]:
    """What a process found out stays with it: each test is a new one."""
    choice._kernel.cache_clear()
    yield
    choice._kernel.cache_clear()


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The race's result, (prefill, decode), instead of a race: no test may hang on a speed."""
    result = [2.0, 3.0]
    monkeypatch.setattr(choice, "race", lambda contenders, *_: {
        name: result if layout is TILES else [1.0, 1.0] for name, layout in contenders.items()})
    return result


@needs_variant
def test_the_faster_one_is_taken_and_said(ratios: list[float]) -> None:
    chosen = choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto")
    assert isinstance(chosen.layout, NativeLayout) and chosen.layout.dtype is torch.bfloat16
    assert chosen.words == f"native {chosen.layout.kernel.name} (2 times torch's speed in prefill, 3 in decode)"
    ratios[:] = [0.5, 1.5]
    chosen = choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto")
    assert chosen.layout is TILES
    assert "torch-cpu-flash (native kernel not used: " in chosen.words
    assert "0.5 times torch's speed in prefill, 1.5 in decode" in chosen.words


@needs_variant
def test_what_is_asked_for_is_taken(ratios: list[float]) -> None:
    ratios[:] = [0.1, 0.1]
    assert choice.choose(SPEC, torch.float32, CPU, 64, "native").layout is not TILES
    assert choice.choose(SPEC, torch.float32, CPU, 64, "torch").words == "torch-cpu-flash (as asked for)"


@needs_variant
@pytest.mark.parametrize("spec, dtype, block, reason", [
    (SPEC, torch.float64, 64, "it computes in float32 and bfloat16, not float64"),
    (SPEC, torch.bfloat16, 40, "a multiple of 16 tokens up to 256, not 40"),
    (SPEC, torch.bfloat16, 512, "a multiple of 16 tokens up to 256, not 512"),
    (make_spec(dim=24), torch.float32, 64, "multiples of 16, not 24 and 24"),
])
def test_what_it_cannot_take_goes_to_torch(spec: choice.AttentionSpec, dtype: torch.dtype, block: int,
                                           reason: str) -> None:
    chosen = choice.choose(spec, dtype, CPU, block, "auto")
    assert chosen.layout is TILES and reason in chosen.words
    with pytest.raises(KernelUnavailable, match=reason):
        choice.choose(spec, dtype, CPU, block, "native")


@needs_variant
def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    chosen = choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto")
    assert chosen.layout is TILES
    assert chosen.words.count("no C++ compiler was found (g++ or clang++, or $CXX)") == 1


@needs_variant
@pytest.mark.parametrize("compiler, reason", [("no-such-compiler", "cannot be run"), ("false", "failed")])
def test_a_compiler_that_fails(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reason in choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto").words
    assert not list(tmp_path.rglob("*.so")), "nothing half-made stays behind"


@needs_variant
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ringserve").write_text("a file where the directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "cannot write to" in choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto").words


@needs_variant
def test_a_kernel_that_is_wrong_never_serves(monkeypatch: pytest.MonkeyPatch, ratios: list[float]) -> None:
    expected = choice.Case.expected
    monkeypatch.setattr(choice.Case, "expected", lambda case: (expected(case)[0] * 1.02, expected(case)[1]))
    chosen = choice.choose(SPEC, torch.bfloat16, CPU, 64, "auto")
    assert chosen.layout is TILES and "it is wrong here: o is off by 2.0e-02 of its RMS" in chosen.words
    with pytest.raises(KernelUnavailable, match="wrong here"):
        choice.choose(SPEC, torch.bfloat16, CPU, 64, "native")


@pytest.mark.parametrize("name", ["triton", "cudnn", "fa3"])
def test_what_is_for_gpus_is_refused_on_a_cpu(name: choice.Wanted) -> None:
    with pytest.raises(KernelUnavailable, match=f"attention by {name} is for GPUs, not cpu"):
        choice.choose(SPEC, torch.bfloat16, CPU, 64, name)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(race, "cache_directory", lambda: tmp_path)
    return tmp_path / "races.json"


def run_race(**contenders: Layout) -> dict[str, list[float]]:
    return race.race(contenders, SPEC, torch.bfloat16, 64, CPU, [(8, 64), (1, 64)])


def test_a_race_is_run_once(monkeypatch: pytest.MonkeyPatch, remembered: Path) -> None:
    first = run_race(one=TILES, other=TILES)
    assert first.keys() == {"one", "other"} and all(len(times) == 2 and min(times) > 0 for times in first.values())
    monkeypatch.setattr(race, "_seconds", None)
    assert run_race(one=TILES, other=TILES) == first
    assert list(json.loads(remembered.read_text()).values()) == [first]
    monkeypatch.setattr(race, "_seconds", lambda *_: 3.0)
    assert run_race(one=TILES, third=TILES) == {"one": [3.0, 3.0], "third": [3.0, 3.0]}  # another race


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": [1, 2]}', '{"a": {"b": [1, NaN]}}',
                                     '{"a": {"b": 1}}', '{"a": {"b": [0]}}', '{"a": {"b": ["c"]}}'])
def test_a_spoilt_memory_is_forgotten(content: str, remembered: Path) -> None:
    remembered.write_text(content)
    assert race._remembered(remembered) == {}


@pytest.mark.parametrize("times", [{"one": [1.0], "other": [1.0]}, {"one": [1.0, 1.0]}, {}])
def test_a_race_that_is_remembered_in_part_is_run_again(times: dict[str, list[float]], remembered: Path) -> None:
    run_race(one=TILES, other=TILES)
    [key] = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({key: times}))
    assert all(len(best) == 2 for best in run_race(one=TILES, other=TILES).values())


@needs_variant
def test_the_native_kernel_is_for_cpus() -> None:
    chosen = choice.choose(SPEC, torch.bfloat16, torch.device("meta"), 64, "auto")
    assert chosen.layout is TILES and "it is for CPUs, not meta" in chosen.words


def test_the_names_of_kernels_are_those_of_the_command_line() -> None:
    assert get_args(choice.Wanted) == get_args(AttentionName)


def test_keys_of_one_order_may_be_exchanged() -> None:
    """Whatever computes on them."""
    class Kernel:
        name = "some"

    first, other, fp32 = (NativeLayout(Kernel(), block, dtype)  # type: ignore[arg-type]
                          for block, dtype in ((64, torch.bfloat16), (32, torch.bfloat16), (64, torch.float32)))
    assert len({first.order, other.order, fp32.order, TILES.order}) == 4
    assert first.order == NativeLayout(Kernel(), 64, torch.bfloat16).order  # type: ignore[arg-type]
