from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families import write_family
from tests.ringserve.rings import Rings, open_rings


@pytest.fixture(scope="session")
def rings() -> Iterator[Rings]:
    with open_rings() as opened:
        yield opened


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> "FamilyDirectory":
    return FamilyDirectory(tmp_path_factory.mktemp("families"))


class FamilyDirectory:
    """Small checkpoints of each family, written when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            write_family(name, path)
        return path
