"""`attend`: the one primitive. Causal attention of a rank's rows over the keys of one storage.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim, N tiles, S keys of a tile.
"""

from dataclasses import dataclass

from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan, GatheredTiles
from ringserve_kernels.merge import merge_rows, new_state
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import attend_tile


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Where keys and values lie: a layer's part of the cache, or a segment that came round the ring.

    Head-major, so that the keys of one head in adjacent slots are one contiguous run.
    """

    k_KPD: Tensor
    v_KPD: Tensor

    @property
    def token_bytes(self) -> int:
        """Of one token's key and value, over all heads."""
        (heads, _, key_dim), value_dim = self.k_KPD.shape, self.v_KPD.shape[2]
        return heads * (key_dim + value_dim) * self.k_KPD.element_size()

    def laid_over(self, message: Tensor) -> "KeyValues":
        """A message of the ring, uint8 [tokens * token_bytes], as keys and values like these: all of K, then all
        of V, head-major."""
        (heads, _, key_dim), value_dim = self.k_KPD.shape, self.v_KPD.shape[2]
        flat = message.view(self.k_KPD.dtype)
        tokens = len(flat) // (heads * (key_dim + value_dim))
        cut = heads * tokens * key_dim
        return KeyValues(flat[:cut].view(heads, tokens, key_dim), flat[cut:].view(heads, tokens, value_dim))


def attend(q_THD: Tensor, keys: KeyValues, plan: AttentionPlan, spec: AttentionSpec,
           into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Attention of every row over the keys that the plan names: (o_THD, lse_TH), fp32 accumulators.

    Rows that see no key have o = 0 and lse = -inf. With `into`, the result is merged into those accumulators
    (which must cover other keys) and they are returned. Equivalent to `reference_attention` over the same keys,
    then `merge_attention_states`.
    """
    assert q_THD.shape == (plan.rows, spec.num_heads, spec.key_dim), (q_THD.shape, plan.rows, spec)
    state = into or new_state(plan.rows, spec.num_heads, spec.value_dim, q_THD.dtype, q_THD.device)
    if not plan.dense and not plan.gathered:
        return state
    q_HTD = q_THD.transpose(0, 1).contiguous()
    for tile in plan.dense:
        rows, span = slice(tile.row_start, tile.row_stop), slice(tile.key_start, tile.key_stop)
        o, lse = attend_tile(q_HTD[None, :, rows], keys.k_KPD[None, :, span], keys.v_KPD[None, :, span], spec)
        merge_rows(*state, rows, o[0].transpose(0, 1), lse[0].transpose(0, 1))
    for tiles in plan.gathered:
        _attend_gathered(q_HTD, keys, tiles, spec, state)
    return state


def _attend_gathered(q_HTD: Tensor, keys: KeyValues, tiles: GatheredTiles, spec: AttentionSpec,
                     state: tuple[Tensor, Tensor]) -> None:
    (n, s), t = tiles.keys_NS.shape, tiles.rows_NT.shape[1]
    flat_keys, flat_rows = tiles.keys_NS.flatten(), tiles.rows_NT.flatten()
    k_NKSD = keys.k_KPD.index_select(1, flat_keys).view(spec.num_kv_heads, n, s, spec.key_dim).transpose(0, 1)
    v_NKSD = keys.v_KPD.index_select(1, flat_keys).view(spec.num_kv_heads, n, s, spec.value_dim).transpose(0, 1)
    q_NHTD = q_HTD.index_select(1, flat_rows).view(spec.num_heads, n, t, spec.key_dim).transpose(0, 1)
    o, lse = attend_tile(q_NHTD, k_NKSD, v_NKSD, spec, tiles.visible_NTS, tiles.bias_NTS(q_HTD.dtype))
    o_THD, lse_TH = o.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    if len(tiles.valid) < len(flat_rows):
        o_THD, lse_TH = o_THD[tiles.valid], lse_TH[tiles.valid]
    merge_rows(*state, tiles.target, o_THD, lse_TH)
