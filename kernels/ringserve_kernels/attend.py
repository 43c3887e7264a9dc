"""`attend`: the one primitive. Causal attention of a rank's rows over the keys of one storage.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim.
"""

import torch
from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan
from ringserve_kernels.errors import DeviceError, DtypeError, ShapeError, StrideError
from ringserve_kernels.key_values import KeyValues
from ringserve_kernels.merge import State, new_state
from ringserve_kernels.spec import AttentionSpec


def attend(q_THD: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec,
           into: State | None = None) -> State:
    """Attention of every row over the keys that the plan names: (o_THD, lse_TH), fp32 accumulators.

    Rows that see no key have o = 0 and lse = -inf. With `into`, the result is merged into those accumulators
    (which must cover other keys) and they are returned. Equivalent to `reference_attention` over the same keys,
    then `merge_attention_states`. Raises ArgumentError.
    """
    _check(q_THD, keys, plan, spec, into)
    state = into or new_state(plan.rows, spec.num_heads, spec.value_dim, q_THD.dtype, q_THD.device)
    if not plan.is_empty:
        keys.layout.attend(q_THD, keys, plan, spec, state)
    return state


def _check(q_THD: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec, into: State | None) -> None:
    """That the arguments belong together; `keys` were checked when they were made."""
    shape = (plan.rows, spec.num_heads, spec.key_dim)
    if tuple(q_THD.shape) != shape:
        raise ShapeError("q_THD", tuple(q_THD.shape), shape)
    for name, x, dim in (("k_KPD", keys.k_KPD, spec.key_dim), ("v_KPD", keys.v_KPD, spec.value_dim)):
        if x.shape[0] != spec.num_kv_heads or x.shape[2] != dim:
            raise ShapeError(name, tuple(x.shape), f"({spec.num_kv_heads}, tokens, {dim})")
    tokens = keys.k_KPD.shape[1]
    if tokens < plan.storage_tokens:
        raise ShapeError("k_KPD", f"of {tokens} tokens", f"at least {plan.storage_tokens}, as the plan reads")
    if keys.k_KPD.device != q_THD.device:
        raise DeviceError("k_KPD", f"on {keys.k_KPD.device}", f"q_THD's, {q_THD.device}")
    if keys.scales_KP is None and keys.k_KPD.dtype != q_THD.dtype:
        raise DtypeError("k_KPD", keys.k_KPD.dtype, f"q_THD's, {q_THD.dtype}, or codes with scales")
    for name, x, wanted in zip(("into[0]", "into[1]"), into or (), ((*shape[:2], spec.value_dim), shape[:2])):
        if tuple(x.shape) != wanted:
            raise ShapeError(name, tuple(x.shape), wanted)
        if x.dtype != torch.promote_types(q_THD.dtype, torch.float32):
            raise DtypeError(name, x.dtype, torch.promote_types(q_THD.dtype, torch.float32))
        if len(wanted) == 3 and x.stride(2) != 1:
            raise StrideError(name, f"strided by {x.stride()}", "the numbers of a head adjacent")
