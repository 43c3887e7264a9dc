"""TileLayout: keys token after token, attended by torch's operations on tiles. Works everywhere.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim, N tiles, S keys of a tile.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringserve_kernels.attention_plan import AttentionPlan, GatheredTiles
from ringserve_kernels.merge import State, merge_rows
from ringserve_kernels.quantize import LARGEST
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import attend_tile

if TYPE_CHECKING:
    from ringserve_kernels.key_values import KeyValues



class TileLayout:
    name = "torch"
    order = "tokens"
    granule = 1

    def check_storage(self, name: str, x_KPD: Tensor) -> None:
        """Anything that is a storage will do."""

    def attend(self, q_THD: Tensor, keys: "KeyValues", plan: AttentionPlan, spec: AttentionSpec, state: State) -> None:
        q_HTD = q_THD.transpose(0, 1).contiguous()
        for tile in plan.tiles.dense:
            rows = slice(tile.row_start, tile.row_stop)
            k_KSD, v_KSD = keys.read(slice(tile.key_start, tile.key_stop), q_THD.dtype)
            o, lse = attend_tile(q_HTD[None, :, rows], k_KSD[None], v_KSD[None], spec)
            merge_rows(*state, rows, o[0].transpose(0, 1), lse[0].transpose(0, 1))
        for tiles in plan.tiles.gathered:
            self._attend_gathered(q_HTD, keys, tiles, spec, state)

    def write(self, x_KTD: Tensor, into_KPD: Tensor, where_T: Tensor, is_value: bool) -> None:
        """Raises torch's IndexError for an offset outside the storage (on GPUs an assertion of the device)."""
        bits = torch.uint8 if into_KPD.dtype in LARGEST else into_KPD.dtype  # index_copy_ knows no fp8
        into_KPD.view(bits).index_copy_(1, where_T, x_KTD.view(bits))

    def _attend_gathered(self, q_HTD: Tensor, keys: "KeyValues", tiles: GatheredTiles, spec: AttentionSpec,
                         state: State) -> None:
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


TILES = TileLayout()
