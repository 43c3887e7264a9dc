"""`attend`: the one primitive. Causal attention of a rank's rows over the keys of one storage.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim, N tiles, S keys of a tile.
"""

from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan, GatheredTiles
from ringserve_kernels.errors import require
from ringserve_kernels.key_values import KeyValues
from ringserve_kernels.merge import merge_rows, new_state
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import attend_tile


def attend(q_THD: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec,
           into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys that the plan names: (o_THD, lse_TH), fp32 accumulators.

    Rows that see no key have o = 0 and lse = -inf. With `into`, the result is merged into those accumulators
    (which must cover other keys) and they are returned. Equivalent to `reference_attention` over the same keys,
    then `merge_attention_states`. Raises ArgumentError.
    """
    _check(q_THD, keys, plan, spec)
    state = into or new_state(plan.rows, spec.num_heads, spec.value_dim, q_THD.dtype, q_THD.device)
    if plan.is_empty:
        return state
    if keys.layout is not None:
        keys.layout.kernel.attend(q_THD, keys.k_KPD, keys.v_KPD, keys.scales_KP, keys.layout.block,
                                  plan.table(keys.layout.block), spec, *state)
        return state
    q_HTD = q_THD.transpose(0, 1).contiguous()
    for tile in plan.tiles.dense:
        rows = slice(tile.row_start, tile.row_stop)
        k_KSD, v_KSD = keys.read(slice(tile.key_start, tile.key_stop), q_THD.dtype)
        o, lse = attend_tile(q_HTD[None, :, rows], k_KSD[None], v_KSD[None], spec)
        merge_rows(*state, rows, o[0].transpose(0, 1), lse[0].transpose(0, 1))
    for tiles in plan.tiles.gathered:
        _attend_gathered(q_HTD, keys, tiles, spec, state)
    return state


def _check(q_THD: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec) -> None:
    shape = (plan.rows, spec.num_heads, spec.key_dim)
    require(tuple(q_THD.shape) == shape, "q_THD", tuple(q_THD.shape), f"of shape {shape}")
    for name, x, dim in (("k_KPD", keys.k_KPD, spec.key_dim), ("v_KPD", keys.v_KPD, spec.value_dim)):
        require(x.dim() == 3 and x.shape[0] == spec.num_kv_heads and x.shape[2] == dim, name, tuple(x.shape),
                f"of shape ({spec.num_kv_heads}, tokens, {dim})")
        require(x.device == q_THD.device, name, x.device, f"on q_THD's device, {q_THD.device}")
        require(x.shape[1] >= plan.storage_tokens, name, x.shape[1],
                f"of at least {plan.storage_tokens} tokens, which the plan names")
        require(x.dtype == q_THD.dtype or keys.scales_KP is not None, name, x.dtype,
                f"of q_THD's dtype, {q_THD.dtype}, or come with scales")
    if keys.layout is not None:
        pack = {1: "torch.float32", 2: "torch.bfloat16"}[keys.layout.pack]
        require(keys.k_KPD.shape[1] % keys.layout.block == 0, "k_KPD", keys.k_KPD.shape[1],
                f"whole blocks of {keys.layout.block} tokens")
        require(str(q_THD.dtype) == pack, "q_THD", q_THD.dtype, f"{pack}, for which the keys were laid out")


def _attend_gathered(q_HTD: Tensor, keys: KeyValues, tiles: GatheredTiles, spec: AttentionSpec,
                     state: tuple[Tensor, Tensor]) -> None:
    (n, s), t = tiles.keys_NS.shape, tiles.rows_NT.shape[1]
    flat_rows = tiles.rows_NT.flatten()
    k_KSD, v_KSD = keys.read(tiles.keys_NS.flatten(), q_HTD.dtype)
    k_NKSD = k_KSD.view(spec.num_kv_heads, n, s, spec.key_dim).transpose(0, 1)
    v_NKSD = v_KSD.view(spec.num_kv_heads, n, s, spec.value_dim).transpose(0, 1)
    q_NHTD = q_HTD.index_select(1, flat_rows).view(spec.num_heads, n, t, spec.key_dim).transpose(0, 1)
    o, lse = attend_tile(q_NHTD, k_NKSD, v_NKSD, spec, tiles.visible_NTS, tiles.bias_NTS(q_HTD.dtype))
    o_THD, lse_TH = o.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    if len(tiles.valid) < len(flat_rows):
        o_THD, lse_TH = o_THD[tiles.valid], lse_TH[tiles.valid]
    merge_rows(*state, tiles.target, o_THD, lse_TH)
