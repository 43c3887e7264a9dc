"""These too need triton."""

from tests.kernels.triton.conftest import pytest_pycollect_makemodule

__all__ = ["pytest_pycollect_makemodule"]
