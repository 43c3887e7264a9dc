"""The page's example does what it says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_example_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["o"].shape == (2, 16, 128) and names["lse"].shape == (2, 16)
    assert names["o"].isfinite().all() and names["lse"].isfinite().all()
