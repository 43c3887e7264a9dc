"""The oracle: attention in fp64, written as the formula. For tests and `ringserve selftest`, never for speed."""

import torch
from torch import Tensor

from ringserve_kernels.spec import AttentionSpec


def visible(row_index_T: Tensor, key_index_S: Tensor, window: int | None) -> Tensor:
    """Which keys each row sees, bool [T, S]: those at or before its own token index, inside the window."""
    distance = row_index_T[:, None] - key_index_S[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def reference_attention(
    q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, row_index_T: Tensor, key_index_S: Tensor,
    spec: AttentionSpec, sink_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v over one sequence, in fp64: (o_THD, lse_TH). Needs T x S memory."""
    groups = spec.num_heads // spec.num_kv_heads
    k_SHD = k_SKD.double().repeat_interleave(groups, dim=1)
    v_SHD = v_SKD.double().repeat_interleave(groups, dim=1)
    scores_HTS = torch.einsum("thd,shd->hts", q_THD.double(), k_SHD) * spec.scale
    if spec.softcap is not None:
        scores_HTS = spec.softcap * torch.tanh(scores_HTS / spec.softcap)
    scores_HTS = scores_HTS.masked_fill(~visible(row_index_T, key_index_S, spec.window), -torch.inf)
    lse_HT = torch.logsumexp(scores_HTS, dim=-1)
    if sink_H is not None:
        lse_HT = torch.logaddexp(lse_HT, sink_H.double()[:, None])
    finite = torch.where(lse_HT == -torch.inf, 0.0, lse_HT)
    weights_HTS = torch.exp(scores_HTS - finite[..., None])
    o_THD = torch.einsum("hts,shd->thd", weights_HTS, v_SHD)
    return o_THD, lse_HT.transpose(0, 1)
