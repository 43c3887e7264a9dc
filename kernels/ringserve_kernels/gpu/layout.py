"""PagedLayout: keys token after token in the blocks of a pool. Long runs of the past go to a dense operation, whatever
is left to Triton's paged kernels: the frontier, scattered blocks, windows, few rows, quantized keys.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim, R packed rows, S keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringserve_kernels.attention_plan import DENSE_KEYS, AttentionPlan, DenseTile
from ringserve_kernels.gpu.dense import TORCH_FLASH, DenseOperation
from ringserve_kernels.merge import State
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile_layout import TileLayout
from ringserve_kernels.triton import Quantized, page_table, triton_attend, triton_merge
from ringserve_kernels.triton.attend import LARGEST_DIM, QUERY_DTYPES
from ringserve_kernels.triton.table import BLOCK_SIZES, TILE_ROWS, WIDE_DIM

if TYPE_CHECKING:
    from ringserve_kernels.key_values import KeyValues


DENSE_ROWS = 64
"""Packed rows from which on a dense operation is worth its call: fewer are a decode step's."""
ROW_STEP = 256
"""Rows are filled up to a multiple of it for operations that plan for each shape."""
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PagedLayout(TileLayout):
    block: int
    dense: DenseOperation | None = None
    """None: Triton for everything."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "triton" if self.dense is None else f"{self.dense.name} and triton"

    @staticmethod
    def refusal(spec: AttentionSpec, dtype: torch.dtype, block: int, dense: bool, quantized: bool) -> str | None:
        """What of this it cannot take, or `dense` operations cannot."""
        group, wide = spec.num_heads // spec.num_kv_heads, max(spec.key_dim, spec.value_dim)
        if dtype not in QUERY_DTYPES:
            return f"no queries in {str(dtype).removeprefix('torch.')}"
        if wide > LARGEST_DIM:
            return f"head dims up to {LARGEST_DIM}, not {wide}"
        if block not in BLOCK_SIZES:
            return f"blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not {block}"
        if group > (most := TILE_ROWS[-1] if wide <= WIDE_DIM else TILE_ROWS[-2]):
            return f"up to {most} query heads on a kv head, not {group}"
        if dense and (spec.softcap is not None or spec.key_dim != spec.value_dim or spec.key_dim % 8):
            return "no soft caps, and keys and values of one width, a multiple of 8"
        if dense and quantized:
            return "no quantized keys"
        if dense and dtype not in HALF:
            return f"16-bit numbers, not {str(dtype).removeprefix('torch.')}"
        return None

    def attend(self, q_THD: Tensor, keys: "KeyValues", plan: AttentionPlan, spec: AttentionSpec, state: State) -> None:
        q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
        if self.dense is not None and keys.scales_KP is None:
            rows = -(-DENSE_ROWS * spec.num_kv_heads // spec.num_heads)
            runs, plan = plan.once(("runs", rows), lambda: plan.without_runs(rows))
            for run in runs:
                for tile, dense in _calls(run, self.dense):
                    _attend_run(q_THD, keys, tile, dense, spec, state)
        if plan.is_empty:
            return
        table = plan.once(("paged", spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim, self.block),
                          lambda: page_table(plan.rows, plan.sequences, spec, self.block, plan.device))
        k, v = _storages(keys)
        triton_attend(q_THD, k, v, table, spec, state)


def _calls(run: DenseTile, dense: DenseOperation) -> Iterator[tuple[DenseTile, DenseOperation]]:
    """The run itself; in powers of two for an operation that plans for each shape, and what is left by another."""
    start = run.key_start
    while dense.fixed_shapes and (left := run.key_stop - start) >= DENSE_KEYS:
        size = 1 << left.bit_length() - 1
        yield replace(run, key_start=start, key_stop=start + size), dense
        start += size
    if start < run.key_stop:
        yield replace(run, key_start=start), TORCH_FLASH if dense.fixed_shapes else dense


def _attend_run(q_THD: Tensor, keys: "KeyValues", tile: DenseTile, dense: DenseOperation, spec: AttentionSpec,
                state: State) -> None:
    """The query heads of a kv head are packed as rows, so that each key is read once."""
    rows, count = slice(tile.row_start, tile.row_stop), tile.row_stop - tile.row_start
    packed = spec.num_heads // spec.num_kv_heads * count
    k_KSD, v_KSD = keys.read(slice(tile.key_start, tile.key_stop), q_THD.dtype)
    q_KRD = q_THD[rows].transpose(0, 1).reshape(spec.num_kv_heads, packed, spec.key_dim)
    if dense.fixed_shapes:
        q_KRD = torch.nn.functional.pad(q_KRD, (0, 0, 0, -packed % ROW_STEP))
    o_NKRD, lse_NKR = dense.run(q_KRD[None], k_KSD[None], v_KSD[None], spec.scale)
    o_HTD = o_NKRD[0, :, :packed].reshape(spec.num_heads, count, spec.value_dim)
    lse_HT = lse_NKR[0, :, :packed].reshape(spec.num_heads, count)
    triton_merge(state[0][rows], state[1][rows], o_HTD.transpose(0, 1), lse_HT.transpose(0, 1))


def _storages(keys: "KeyValues") -> tuple[Tensor | Quantized, Tensor | Quantized]:
    if keys.scales_KP is None:
        return keys.k_KPD, keys.v_KPD
    return Quantized(keys.k_KPD, keys.scales_KP[0]), Quantized(keys.v_KPD, keys.scales_KP[1])
