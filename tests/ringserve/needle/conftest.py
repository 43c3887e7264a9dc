from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ringserve.model.quiet import quiet_transformers
from ringserve.needle import build_needle
from ringserve.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("needle")
    build_needle(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(needle: Path) -> Tokenizer:
    return Tokenizer(str(needle))


@cache
def plain_model(directory: Path, dtype: torch.dtype, attention: str) -> Any:
    """The model as transformers alone loads and runs it."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()
