"""Triton's kernels: numbers in its interpreter (on a GPU where there is one), and what ptxas makes of them."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'ringserve[triton]'")
