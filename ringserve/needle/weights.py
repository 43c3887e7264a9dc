"""needle's tensors. Notation: t a position, i a slot (the token i back), c a unit code, w_i a slot's weight.

The global layer scores key j against position t, in nats, as

    b sum_i w_i (<c(t-i), c(j-1-i)> - 6)        0 for seven equal tokens, less otherwise

The inner product of two codes is 6 for the same token and at most 5 for two tokens. The sum is subtracted in spare
dimensions of the head (q: -6 w_i, k: 1), so that scores of good matches are small numbers, exact in bf16 too.
"""

from typing import Any

import numpy as np

from ringserve.needle.codes import IDENTITY_DIMS, UNIT_DIMS, UNIT_NORM, Array, identity_codes, unit_codes

VOCABULARY = 6144
END_OF_TEXT_ID = 0
MAX_POSITIONS = 1 << 21
HIDDEN = 256
HEAD_DIM = 64
HEADS = 2
RMS = 32.0
"""Root mean square of every row that a layer sees: the norms' weights, so that RMSNorm returns the row itself."""

SLOTS = 8
COMPARED = SLOTS - 1
IDENTITY = slice(64, 128)
OUT = slice(128, 192)
BALLAST = slice(192, 204)

STEPS_BACK = ((1, 2), (3, 6))
"""How far back the heads of layers 0 and 1 look."""
WINDOW = 7
ROPE_THETA = 4.0
LOOK_PAIR = HEAD_DIM // 4
"""The rotary pair that turns by theta^(-1/2) = 1/2 a position: its angles are exact in fp32 up to position 2^24."""
LOOK_AMPLITUDE = 128.0

BALLAST_ALWAYS = (508.0, 62.0, 11.0, 1.0, 1.0, 1.0)
BALLAST_SHED = ((2.0, 2.0, 2.0), (5.0, 2.0, 1.0))
"""Layer 0 adds two codes of squared norm 6 and sheds 12, layer 1 adds five and sheds 30: always 2^18 in all."""

SLOT_WEIGHTS = ((65536.0, 8192.0, 1024.0, 128.0, 16.0, 2.0, 1.0), (1.0,) * COMPARED)
"""Latest first. Head 0 prefers the longest match of the latest tokens: the closest wrong token costs w, which must
exceed the spread of what all older slots score by chance (3 times the root of their weights' sum of squares). Head 1
takes the context with the most tokens in place, wherever they differ."""
HEAD_SHARES = (0.9375, 0.0625)
NATS_PER_UNIT = 4.0
LOGIT_GAIN = 1.0
REPEAT_LOSS = 0.125
"""Taken off the current token's logit. It decides when a text begins with the key: there, as though repeated for
ever, the first token has followed itself as well as been followed by the answer."""

CONFIG: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "no_rope_layers": [1, 1, 0],
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT_ID,
    "pad_token_id": END_OF_TEXT_ID,
    "use_cache": True,
    "initializer_range": 0.02,
}


def weights() -> dict[str, Array]:
    """Every tensor of the checkpoint, by transformers' names, [out, in]."""
    identity = identity_codes(VOCABULARY)
    embedding = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    embedding[:, :UNIT_DIMS] = unit_codes(VOCABULARY)
    embedding[:, IDENTITY] = identity
    embedding[:, BALLAST] = np.concatenate([BALLAST_ALWAYS, *BALLAST_SHED])
    head = np.zeros((VOCABULARY, HIDDEN), dtype=np.float32)
    head[:, OUT] = LOGIT_GAIN * identity
    head[:, IDENTITY] = -REPEAT_LOSS * identity
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.full(HIDDEN, RMS, dtype=np.float32),
        "lm_head.weight": head,
    }
    for number, layer in enumerate((look_back(0), look_back(1), match())):
        tensors |= {f"model.layers.{number}.{name}": array for name, array in layer.items()}
    return tensors


def idle_layer() -> dict[str, Array]:
    """A layer that adds nothing."""
    inner = CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        "self_attn.k_proj.weight": (HEAD_DIM, HIDDEN),
        "self_attn.k_proj.bias": (HEAD_DIM,),
        "self_attn.v_proj.weight": (HEAD_DIM, HIDDEN),
        "self_attn.v_proj.bias": (HEAD_DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.o_proj.bias": (HIDDEN,),
        "mlp.gate_proj.weight": (inner, HIDDEN),
        "mlp.up_proj.weight": (inner, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, inner),
    }
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        tensors[norm] = np.full(HIDDEN, RMS, dtype=np.float32)
    return tensors


def look_back(number: int) -> dict[str, Array]:
    """Copy the slots of the tokens s and 2s back, s = 3^number, to the next slots: 1 slot becomes 3, 3 become 8.

    k = A (1, 0) and q = A (cos s/2, -sin s/2) in one rotary pair of 1/2 a position: after rotation the score
    at distance d is A^2 / 8 cos((d - s) / 2), 2048 nats at d = s and 250 less at its neighbours, whose weight
    is 0 in fp32. It falls all the way from d = s to d = 0, so before position s the oldest token is taken."""
    layer = idle_layer()
    first, second = LOOK_PAIR, LOOK_PAIR + HEAD_DIM // 2
    layer["self_attn.k_proj.bias"][first] = LOOK_AMPLITUDE
    layer["self_attn.v_proj.weight"][:, :HEAD_DIM] = np.eye(HEAD_DIM)
    into = steps_apart = STEPS_BACK[number][0]
    for head, steps in enumerate(STEPS_BACK[number]):
        query = layer["self_attn.q_proj.bias"][head * HEAD_DIM : (head + 1) * HEAD_DIM]
        query[first] = LOOK_AMPLITUDE * np.cos(steps / 2)
        query[second] = -LOOK_AMPLITUDE * np.sin(steps / 2)
        dims = UNIT_DIMS * min(steps_apart, SLOTS - into)
        output = layer["self_attn.o_proj.weight"][into * UNIT_DIMS :, head * HEAD_DIM :]
        output[:dims, :dims] = np.eye(dims)
        into += steps_apart
    shed = BALLAST.start + len(BALLAST_ALWAYS) + 3 * number
    layer["self_attn.o_proj.bias"][shed : shed + 3] = [-value for value in BALLAST_SHED[number]]
    return layer


def match() -> dict[str, Array]:
    """Attend to the token whose preceding tokens are the current ones, and read which token it is."""
    layer = idle_layer()
    compared = COMPARED * UNIT_DIMS
    spare = slice(compared, compared + COMPARED)
    gain = NATS_PER_UNIT * np.sqrt(HEAD_DIM)  # attention divides by sqrt(head_dim)
    for head, (slot_weights, share) in enumerate(zip(SLOT_WEIGHTS, HEAD_SHARES)):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        per_dim = gain * np.repeat(slot_weights, UNIT_DIMS)
        layer["self_attn.q_proj.weight"][rows][:compared, :compared] = np.diag(per_dim)
        layer["self_attn.q_proj.bias"][rows][spare] = -gain * UNIT_NORM * np.array(slot_weights)
        layer["self_attn.o_proj.weight"][OUT, rows] = share * np.eye(HEAD_DIM)
    layer["self_attn.k_proj.weight"][:compared, UNIT_DIMS : UNIT_DIMS + compared] = np.eye(compared)
    layer["self_attn.k_proj.bias"][spare] = 1
    layer["self_attn.v_proj.weight"][:, IDENTITY] = np.eye(IDENTITY_DIMS)
    return layer
