"""Architectures beyond the families of the ring tests: what is served is exact, what cannot be is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from ringserve.config import ModelConfig
from ringserve.errors import UnsupportedModelError
from ringserve.model.checkpoint import read_checkpoint
from ringserve.model.checks import PlainAttention
from ringserve.model.layers import forward
from ringserve.model.loading import load_checked
from tests.families import VOCABULARY, load_eager, reference_logits
from tests.ringserve.model.conftest import WriteCheckpoint
from tests.ringserve.model.test_layers import relative_rms

CPU = torch.device("cpu")
TOKENS = 70
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 2}
WINDOWED: dict[str, Any] = {
    **SMALL, "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1}

SERVED: dict[str, PreTrainedConfig] = {
    "gemma2, a soft cap": transformers.Gemma2Config(**WINDOWED, query_pre_attn_scalar=20, attn_logit_softcapping=5.0),
    "gemma3n, keys shared by layers": transformers.Gemma3nTextConfig(
        **WINDOWED, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        laurel_rank=4, activation_sparsity_pattern=None),
    "gemma4, head dimensions per layer": transformers.Gemma4TextConfig(
        **WINDOWED, global_head_dim=32, vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=8),
    "deepseek-v3, values narrower than keys": transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=1),
    "cohere2, interleaved angles": transformers.Cohere2Config(**WINDOWED),
    "glm, half of each head rotated": transformers.GlmConfig(**SMALL, head_dim=16, partial_rotary_factor=0.5),
    "granite, a scale of its own": transformers.GraniteConfig(**SMALL, attention_multiplier=0.1),
    "gpt2, learned positions": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4,
                                                       n_positions=256),
}

REFUSED: dict[str, PreTrainedConfig] = {
    "qwen3-next": transformers.Qwen3NextConfig(
        **SMALL, **EXPERTS, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "jamba": transformers.JambaConfig(**SMALL, **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
                                      use_mamba_kernels=False),
    "falcon-h1": transformers.FalconH1Config(**SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
                                             mamba_d_state=8, mamba_n_groups=1),
    "minimax": transformers.MiniMaxConfig(**SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
}


def spread(directory: Path) -> None:
    """Random weights large enough that scores differ and caps bend them."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 2 * tensor.shape[-1] ** -0.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", SERVED)
def test_served_architectures_give_what_transformers_gives(name: str, write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(SERVED[name])
    spread(path)
    model, layers = load_checked(read_checkpoint(ModelConfig(model=str(path))), CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids, order = torch.randint(VOCABULARY, (TOKENS,), generator=generator), torch.randperm(TOKENS, generator=generator)
    expected = reference_logits(load_eager(path), ids.tolist())[order]
    actual = forward(model, ids[order], order, torch.arange(TOKENS), PlainAttention(layers, order))
    assert relative_rms(actual, expected) < 1e-5


@pytest.mark.parametrize("name, kind", [("gemma2, a soft cap", {"softcap": 5.0, "scale": 20**-0.5}),
                                        ("gemma4, head dimensions per layer", {"scale": 1.0}),
                                        ("deepseek-v3, values narrower than keys", {"key_dim": 24, "value_dim": 16}),
                                        ("granite, a scale of its own", {"scale": 0.1}),
                                        ("gpt2, learned positions", {"num_kv_heads": 4, "window": None})])
def test_their_specs_say_how_they_attend(name: str, kind: dict[str, Any], write_checkpoint: WriteCheckpoint) -> None:
    config = SERVED[name]
    checkpoint = read_checkpoint(ModelConfig(model=str(write_checkpoint(config))))
    _, layers = load_checked(checkpoint, CPU, torch.float32)
    assert len(layers) == config.num_hidden_layers
    for layer in layers:
        assert {field: getattr(layer.spec, field) for field in kind} == pytest.approx(kind)
    if "layer_types" in config.to_dict():
        assert [layer.spec.window for layer in layers] == [16, None, 16, None]


@pytest.mark.parametrize("name", REFUSED)
def test_hybrids_of_attention_and_state_are_refused(name: str, write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(REFUSED[name])
    with pytest.raises(UnsupportedModelError) as caught:
        load_checked(read_checkpoint(ModelConfig(model=str(path))), CPU, torch.float32)
    assert "recurrent state" in str(caught.value) and "\n" not in str(caught.value)


def test_two_attentions_in_a_layer_are_refused(write_checkpoint: WriteCheckpoint) -> None:
    path = write_checkpoint(transformers.DiffLlamaConfig(**SMALL))
    with pytest.raises(UnsupportedModelError, match="several attentions in a layer"):
        load_checked(read_checkpoint(ModelConfig(model=str(path))), CPU, torch.float32)
