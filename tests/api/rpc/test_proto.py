"""The contract: its style, the code made of it, and that it stays what clients were built with."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROTO = ROOT / "api" / "proto"
RELEASED = PROTO / "released.binpb"
"""Made with `buf build api/proto -o api/proto/released.binpb` at each release."""


def buf(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = Path(sys.executable).parent / "buf"
    if not command.exists():
        pytest.skip("buf is not installed")
    return subprocess.run([str(command), *arguments], capture_output=True, text=True, timeout=60)


def check_compatible(protos: Path) -> str:
    done = buf("breaking", str(protos), "--against", str(RELEASED))
    assert (done.returncode == 0) == (done.stdout == ""), done.stderr
    return done.stdout


def test_style() -> None:
    done = buf("lint", str(PROTO))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_committed_code_is_that_of_the_sources(tmp_path: Path) -> None:
    runpy.run_path(str(PROTO / "generate.py"))["generate"](tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    there = sorted(path.relative_to(ROOT) for path in (ROOT / "ringserve" / "v1").glob("*.py*") if
                   path.name != "__init__.py")
    assert made == there
    for path in made:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), f"run api/proto/generate.py: {path}"


def test_what_was_released_still_works() -> None:
    assert check_compatible(PROTO) == ""


@pytest.mark.parametrize("before, after, word", [
    ("uint64 offset = 1;", "uint64 offset = 9;", "offset"),
    ("fixed32 crc32c = 3;", "fixed64 crc32c = 3;", "crc32c"),
    ("  rpc Attach(AttachRequest) returns (stream AttachResponse);\n", "", "Attach")])
def test_a_change_that_breaks_clients_is_found(tmp_path: Path, before: str, after: str, word: str) -> None:
    copy = tmp_path / "proto"
    shutil.copytree(PROTO, copy)
    path = copy / "ringserve" / "v1" / "inference.proto"
    source = path.read_text()
    assert before in source
    path.write_text(source.replace(before, after))
    assert word in check_compatible(copy)
