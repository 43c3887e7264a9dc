"""Attention over one tile: every row sees every key, or what a mask says. The only file that calls a backend.

Shape suffixes: N tiles, H query heads, K kv heads, G = H/K, T rows, S keys, D head dim.
All paths return `o_NHTD` and `lse_NHT` under the contract of `merge`; what a backend does differently (its own
masked-row value, padded or transposed LSE) is made good here, where it is wrapped.
"""

import torch
from torch import Tensor

from ringserve_kernels.merge import merge_attention_states, new_state
from ringserve_kernels.spec import AttentionSpec

MATH_KEYS = 2048
"""Keys per block of the plain-torch path: bounds its score matrix."""

_HALF = (torch.bfloat16, torch.float16)


def backend(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, masked: bool) -> str:
    """Which path a tile takes: `torch-cpu-flash`, `torch-cuda-flash` or `torch-math` (plain operations)."""
    if spec.softcap is not None or spec.key_dim != spec.value_dim:
        return "torch-math"
    if device.type == "cpu":
        return "torch-cpu-flash"
    if device.type == "cuda" and not masked and dtype in _HALF and spec.key_dim <= 256 and spec.key_dim % 8 == 0:
        return "torch-cuda-flash"
    return "torch-math"


def attend_tile(
    q_NHTD: Tensor, k_NKSD: Tensor, v_NKSD: Tensor, spec: AttentionSpec,
    visible_NTS: Tensor | None = None, bias_NTS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of N tiles. `visible_NTS` (bool) masks keys; `bias_NTS` is the same as 0 / -inf in q's dtype.

    Without a mask the query heads of a kv head are packed as rows, so that each key is read once.
    """
    n, h, t, d = q_NHTD.shape
    k, s = k_NKSD.shape[1], k_NKSD.shape[2]
    if s == 0 or t == 0:
        o_THD, lse_TH = new_state(n * t, h, spec.value_dim, q_NHTD.dtype, q_NHTD.device)
        return o_THD.view(n, t, h, spec.value_dim).transpose(1, 2), lse_TH.view(n, t, h).transpose(1, 2)
    path = backend(spec, q_NHTD.device, q_NHTD.dtype, visible_NTS is not None)
    if path == "torch-math":
        return _math(q_NHTD, k_NKSD, v_NKSD, spec, visible_NTS)
    if visible_NTS is None:
        packed = q_NHTD.reshape(n, k, (h // k) * t, d)
        if path == "torch-cpu-flash":
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                packed, k_NKSD, v_NKSD, scale=spec.scale)
        else:
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention(
                packed, k_NKSD, v_NKSD, scale=spec.scale)[:2]
        return o.reshape(n, h, t, d), lse.reshape(n, h, t)
    assert bias_NTS is not None
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_NHTD, k_NKSD, v_NKSD, attn_mask=bias_NTS.unsqueeze(1), scale=spec.scale)
    # A row that sees no key comes back with LSE 0 from this op: it must be -inf, or the merge counts it.
    blind_N1T = ~visible_NTS.any(-1).unsqueeze(1)
    return o.masked_fill(blind_N1T.unsqueeze(-1), 0.0), lse.masked_fill(blind_N1T, -torch.inf)


def _math(q_NHTD: Tensor, k_NKSD: Tensor, v_NKSD: Tensor, spec: AttentionSpec,
          visible_NTS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain operations in fp32 (fp64 for fp64), a block of keys at a time: any device, any spec."""
    n, h, t, d = q_NHTD.shape
    kv_heads = k_NKSD.shape[1]
    dtype = torch.promote_types(q_NHTD.dtype, torch.float32)
    q_NKRD = q_NHTD.reshape(n, kv_heads, (h // kv_heads) * t, d).to(dtype) * spec.scale
    o = q_NKRD.new_zeros(n, h, t, spec.value_dim)
    lse = q_NKRD.new_full((n, h, t), -torch.inf)
    for start in range(0, k_NKSD.shape[2], MATH_KEYS):
        keys = slice(start, start + MATH_KEYS)
        scores = q_NKRD @ k_NKSD[:, :, keys].to(dtype).transpose(2, 3)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        scores = scores.view(n, kv_heads, h // kv_heads, t, -1)
        if visible_NTS is not None:
            scores = scores.masked_fill(~visible_NTS[:, None, None, :, keys], -torch.inf)
        top = scores.amax(dim=-1, keepdim=True)
        weights = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top))
        # Divided by their own sum, so that V = 1 gives 1; it is at least 1 wherever a row sees a key.
        total = weights.sum(dim=-1, keepdim=True)
        part_o = (weights / total.clamp(min=1.0)).flatten(2, 3) @ v_NKSD[:, :, keys].to(dtype)
        part_lse = top + total.log()
        merge_attention_states(o, lse, part_o.reshape(n, h, t, -1), part_lse.reshape(n, h, t))
    return o, lse
