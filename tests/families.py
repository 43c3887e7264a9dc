"""Small random-weight checkpoints of each model family, in the real formats, and what transformers computes of them.

Windows are short, so that a hundred tokens cross them; queries and keys are scaled up, so that scores are peaked and
an error in attention shows in the logits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ringserve.config import ModelConfig
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.quiet import quiet_transformers
from ringserve.model.rope import fix_frequencies

WINDOW = 24
VOCABULARY = 512
MAX_POSITIONS = 2048
END_ID = 256

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS,
    "eos_token_id": END_ID, "bos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

Config = Callable[[], Any]

CONFIGS: dict[str, Config] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**COMMON, head_dim=16, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 6, "tie_word_embeddings": True}, head_dim=32, sliding_window=WINDOW,
        query_pre_attn_scalar=32, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        + ["sliding_attention"] * 2 + ["full_attention"]),
    "phi3": lambda: transformers.Phi3Config(**{**COMMON, "pad_token_id": 0}, sliding_window=WINDOW),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **{**COMMON, "pad_token_id": 0}, original_max_position_embeddings=128, rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
            "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}),
    "smollm3": lambda: transformers.SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 1, 0]),
    "olmo2": lambda: transformers.Olmo2Config(**COMMON),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        decoder_sparse_step=1, norm_topk_prob=True),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW,
        layer_types=ALTERNATING),
}
FAMILIES = list(CONFIGS)
WINDOWED = ["mistral", "gemma3", "phi3", "gpt-oss"]
WITH_SINKS = ["gpt-oss"]


def write_family(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the family's checkpoint, tokenizer included."""
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            _spread(parameter_name, parameter)
        model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory)


def _spread(name: str, parameter: Tensor) -> None:
    """Initial weights are small: scores and expert choices would all be nearly equal."""
    with torch.no_grad():
        if "sinks" in name:
            parameter.normal_(1.0, 1.0)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" in name or "lm_head" in name:
            parameter.normal_(0.0, 0.5)
        else:
            factor = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
            parameter.normal_(0.0, factor * parameter.shape[-1] ** -0.5)


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes, an end token, a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<|end|>": END_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>{% endif %}")
    fast.save_pretrained(directory)


def load_eager(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The family's model under transformers' own eager attention and masks."""
    checkpoint = read_checkpoint(ModelConfig(model=str(directory)))
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, config=checkpoint.config, dtype=dtype, attn_implementation="eager", **experts).eval()
    fix_frequencies(model, checkpoint.max_model_len)
    return model


def reference_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocabulary]"""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits
