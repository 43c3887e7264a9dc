"""Without triton, an extra, these tests are skipped, before their modules import it."""

from importlib.util import find_spec
from pathlib import Path

import pytest

REASON = "triton is not installed: pip install 'ringserve[triton]'"


class WithoutTriton(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if find_spec("triton") is None:
        return WithoutTriton.from_parent(parent, path=module_path)
    return None
