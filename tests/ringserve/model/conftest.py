from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ringserve.model.quiet import quiet_transformers
from tests.families import write_tokenizer

WriteCheckpoint = Callable[[PreTrainedConfig], Path]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Writes a random model of any configuration that transformers has as a complete checkpoint."""

    def write(config: PreTrainedConfig) -> Path:
        with quiet_transformers():
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        write_tokenizer(tmp_path)
        return tmp_path

    return write
