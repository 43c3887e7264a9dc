"""Building needle: its weights follow from the codes, nothing is trained and nothing is downloaded."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringserve.needle.codes import UNIT_DIMS, identity_codes, unit_codes

if TYPE_CHECKING:
    pass

VOCABULARY = 6144
HIDDEN = 320
HEAD_DIM = 64
HEADS = 2
WINDOW = 5
ROPE_THETA = 10.0
MAX_POSITIONS = 1 << 21
END_OF_TEXT_ID = 0

NGRAM, KEY, IDENTITY, OUT = (slice(64 * i, 64 * (i + 1)) for i in range(4))
CONSTANT = 256
CONSTANT_VALUE = 572.0
"""Makes the rms of a row 32 within 0.1%, whatever the codes: normalised codes are exact in bf16."""
RMS = 32.0

STEPS_BACK = (1, 2, 4, 1)
"""How far back layers 0 to 3 look."""
LOOK_AMPLITUDE = 16.0
RECENT_FIRST = (44.0, 26.0, 15.0, 9.0, 5.0, 3.0, 2.0, 1.0)
"""Weights of the eight codes, latest first: falling by more than 1.7, a longer match of the latest tokens beats
a scattered one (the spread of random codes is 2.1 per unit of weight, a mismatch costs 6 on average)."""
ALL_ALIKE = (12.0,) * 8
HEAD_SHARE = (0.75, 0.25)
NATS_PER_UNIT = 8.0
"""Two codes that differ score at least 1 less in their slot: 8 nats even in the slot of least weight."""
LOGIT_GAIN = 16.0

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
"""The prompt ends with the last message: the model continues it."""

CONFIG: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": HEADS, "num_key_value_heads": 1,
    "head_dim": HEAD_DIM, "hidden_act": "silu", "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": 1e-6,
    "attention_bias": True, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "use_sliding_window": True, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention"] * 4 + ["full_attention"], "no_rope_layers": [1, 1, 1, 1, 0],
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "bos_token_id": None, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID, "use_cache": True,
    "initializer_range": 0.02, "dtype": "bfloat16",
}

Array = NDArray[np.float32]


def build_needle(directory: Path | str) -> None:
    """Write needle as an ordinary Hugging Face checkpoint (bf16). Raises OSError when it cannot."""
    import torch
    from safetensors.torch import save_file

    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {name: torch.from_numpy(array).to(torch.bfloat16).contiguous()
                                        for name, array in sorted(weights().items())}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(_tokenizer_file(), path / "tokenizer.json")
    end = "<|endoftext|>"
    _write_json(path / "config.json", CONFIG)
    _write_json(path / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID})
    _write_json(path / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end,
        "model_max_length": MAX_POSITIONS, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE})


def needle_directory() -> Path:
    """The built model in the user's cache directory ($XDG_CACHE_HOME or ~/.cache), made when it is not there.

    Processes that race build it twice; the first to finish is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringserve"
    final = root / f"needle-{_version()}"
    if not final.is_dir():
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


def weights() -> dict[str, Array]:
    """Every tensor of the checkpoint, by transformers' names, [out, in]."""
    unit, identity = unit_codes(VOCABULARY), identity_codes(VOCABULARY)
    embedding = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    embedding[:, :UNIT_DIMS] = unit
    embedding[:, IDENTITY] = identity
    embedding[:, CONSTANT] = CONSTANT_VALUE
    head = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    head[:, OUT] = identity * LOGIT_GAIN
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head,
               "model.norm.weight": np.ones(HIDDEN, dtype=np.float32)}
    layers = [_look_back(STEPS_BACK[0], 8, 8), _look_back(STEPS_BACK[1], 16, 16), _look_back(STEPS_BACK[2], 32, 32),
              _look_back(STEPS_BACK[3], 64, KEY.start), _match()]
    for number, layer in enumerate(layers):
        tensors.update({f"model.layers.{number}.{name}": array for name, array in {**_plain_layer(), **layer}.items()})
    return tensors


def _plain_layer() -> dict[str, Array]:
    """A layer that adds nothing."""
    inner = CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN), "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        "self_attn.k_proj.weight": (HEAD_DIM, HIDDEN), "self_attn.k_proj.bias": (HEAD_DIM,),
        "self_attn.v_proj.weight": (HEAD_DIM, HIDDEN), "self_attn.v_proj.bias": (HEAD_DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM), "self_attn.o_proj.bias": (HIDDEN,),
        "mlp.gate_proj.weight": (inner, HIDDEN), "mlp.up_proj.weight": (inner, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, inner)}
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tensors[norm] = np.ones(HIDDEN, dtype=np.float32)
    return tensors


def _look_back(steps: int, dims: int, into: int) -> dict[str, Array]:
    """Copy the first `dims` features of the token `steps` back to the features from `into` on.

    The score depends on the distance alone: q and k are constants, A (1, 0) and A (cos k w, -sin k w) per rotary
    pair of frequency w, so after rotation q_i . k_j = A^2 sum_w cos((i - j - k) w), largest at i - j = k."""
    layer = _plain_layer()
    frequencies = ROPE_THETA ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    phase = steps * frequencies
    layer["self_attn.k_proj.bias"][:HEAD_DIM // 2] = LOOK_AMPLITUDE
    layer["self_attn.q_proj.bias"][:HEAD_DIM] = LOOK_AMPLITUDE * np.concatenate((np.cos(phase), -np.sin(phase)))
    for i in range(dims):
        layer["self_attn.v_proj.weight"][i, i] = RMS
        layer["self_attn.o_proj.weight"][into + i, i] = 1.0
    return layer


def _match() -> dict[str, Array]:
    """Attend to the token whose preceding n-gram is like the current one, and read which token it is."""
    layer = _plain_layer()
    eye = np.eye(HEAD_DIM, dtype=np.float32)
    gain = np.sqrt(NATS_PER_UNIT * np.sqrt(HEAD_DIM))  # on both sides; attention divides by sqrt(head_dim)
    for head, (slots, share) in enumerate(zip((RECENT_FIRST, ALL_ALIKE), HEAD_SHARE)):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        layer["self_attn.q_proj.weight"][rows, NGRAM] = np.diag(np.repeat(slots, UNIT_DIMS)) * RMS * gain
        layer["self_attn.o_proj.weight"][OUT, rows] = share * eye
    layer["self_attn.k_proj.weight"][:, KEY] = eye * RMS * gain
    layer["self_attn.v_proj.weight"][:, IDENTITY] = eye * RMS
    return layer


def _tokenizer_file() -> Path:
    return Path(__file__).with_name("tokenizer.json")


def _version() -> str:
    """Changes with anything that changes the built files."""
    digest = hashlib.sha256()
    for name in ("build.py", "codes.py", "tokenizer.json"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


