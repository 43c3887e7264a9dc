"""Writing needle's checkpoint: the weights follow from the codes, nothing is trained and nothing is downloaded."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from ringserve.cache_directory import cache_directory
from ringserve.needle.weights import CONFIG, END_OF_TEXT_ID, MAX_POSITIONS, weights

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] or [] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
"""The messages, a line break between them. The prompt ends with the last one: the model continues it."""


def build_needle(directory: Path | str, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> None:
    """Write needle as an ordinary Hugging Face checkpoint. Raises OSError when it cannot."""
    # Loaded here because the command line imports this module and must answer at once.
    import torch
    from safetensors.torch import save

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in weights().items()}
    # Not save_file: it writes for the owner alone.
    (path / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    shutil.copyfile(Path(__file__).with_name("tokenizer.json"), path / "tokenizer.json")
    end = {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(path / "config.json", {**CONFIG, "dtype": dtype})
    _write_json(path / "generation_config.json", end)
    _write_json(path / "tokenizer_config.json", tokenizer)


def needle_directory() -> Path:
    """The built model in the user's cache directory ($XDG_CACHE_HOME or ~/.cache), made when it is not there.

    Processes that race each build it; the first to finish is kept, and no one sees an unfinished directory."""
    root = cache_directory()
    final = root / f"needle-{_version()}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="needle-", dir=root))
    try:
        build_needle(scratch)
        scratch.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _version() -> str:
    """Changes with anything that changes the built files."""
    digest = hashlib.sha256()
    for name in ("build.py", "codes.py", "weights.py", "tokenizer.json"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
