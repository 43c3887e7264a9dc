"""Building: the same bytes every time, once per machine, and a plain checkpoint at the end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ringserve.config import ModelConfig
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.loading import load_checked
from ringserve.needle import build, build_needle, needle_directory, weights

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ringserve"


def test_two_builds_are_the_same_bytes(needle: Path, tmp_path: Path) -> None:
    build_needle(tmp_path / "made" / "on the way")
    again = tmp_path / "made" / "on the way"
    assert {file.name for file in needle.iterdir()} == {file.name for file in again.iterdir()} == FILES
    for name in FILES:
        assert (needle / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_passes_every_check_of_a_served_model(needle: Path, dtype: torch.dtype) -> None:
    checkpoint = read_checkpoint(ModelConfig(model=str(needle)))
    assert (checkpoint.dtype, checkpoint.max_model_len) == ("bfloat16", weights.MAX_POSITIONS)
    assert checkpoint.eos_token_ids == (weights.END_OF_TEXT_ID,)
    assert checkpoint.default_sampling == {}
    _, layers = load_checked(checkpoint, torch.device("cpu"), dtype)
    assert [layer.spec.window for layer in layers] == [weights.WINDOW] * 2 + [None]
    assert {(layer.spec.num_heads, layer.spec.num_kv_heads, layer.spec.key_dim) for layer in layers} == {(2, 1, 64)}


def test_two_processes_that_race_both_get_the_whole_directory(tmp_path: Path) -> None:
    script = "from ringserve.needle import needle_directory; print(needle_directory())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    racers = [subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
              for _ in range(2)]
    places = {Path(racer.communicate(timeout=120)[0].strip()) for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert len(places) == 1
    assert {file.name for file in places.pop().iterdir()} == FILES
    assert len(list((tmp_path / "ringserve").iterdir())) == 1, "a scratch directory is left"


def test_the_loser_of_a_race_takes_the_winners_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_while_another_finishes(scratch: Path) -> None:
        (scratch / "mine").touch()
        winner = cache / f"needle-{build._version()}"
        winner.mkdir()
        (winner / "theirs").touch()

    monkeypatch.setattr(build, "build_needle", build_while_another_finishes)
    assert [file.name for file in needle_directory().iterdir()] == ["theirs"]
    assert len(list(cache.iterdir())) == 1


def test_a_build_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(scratch: Path) -> None:
        (scratch / "half").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(build, "build_needle", fail)
    with pytest.raises(OSError, match="no space"):
        needle_directory()
    assert not list(cache.iterdir())


def test_a_built_directory_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = needle_directory()
    monkeypatch.setattr(build, "build_needle", lambda _: pytest.fail("built again"))
    assert needle_directory() == first and first.parent == cache


def test_another_construction_gets_another_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build._version()
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("build.py", "codes.py", "weights.py"):
        (tmp_path / name).write_bytes(Path(build.__file__).with_name(name).read_bytes())
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    assert build._version() != before


def test_the_cache_is_where_the_user_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(build, "build_needle", lambda _: None)
    assert needle_directory().parent == tmp_path / ".cache" / "ringserve"
