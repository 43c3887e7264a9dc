"""`triton_attend`: causal attention of ragged rows over a shard of a paged KV cache, on a GPU.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim, S rows of the scratch.
"""

import torch
import triton
from torch import Tensor

from ringserve_kernels.errors import DtypeError, ShapeError
from ringserve_kernels.merge import State, new_state
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.triton.arguments import INTERPRETED, check_device, check_rows_contiguous, check_tensor
from ringserve_kernels.triton.launch import Launch
from ringserve_kernels.triton.paged import paged_attention_kernel
from ringserve_kernels.triton.quantized import (
    FP8_BY_BITS,
    FP8_IN_HARDWARE,
    INT8,
    PLAIN,
    Quantized,
    check_quantized,
    code_bytes,
)
from ringserve_kernels.triton.reduction import reduction_kernel
from ringserve_kernels.triton.table import PagedTable, TileItems
from ringserve_kernels.triton.tiling import attention_tiling, fp32_precision

LARGEST_DIM = 256
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODE_UNIT = {int(PLAIN): 1.0, int(INT8): 128.0, int(FP8_BY_BITS): 512.0, int(FP8_IN_HARDWARE): 512.0}
"""Powers of two that bring the scales of values, about 1/127 or 1/448 of them, to about 1: in fp16, weights times scale
keep their bits. Taken back, exactly, when a tile is done."""
REDUCED_PARTIALS = 16
"""Partials that the reduction loads at a time."""

Storage = Tensor | Quantized


def triton_attend(q_THD: Tensor, k: Storage, v: Storage, table: PagedTable, spec: AttentionSpec,
                  into: State | None = None) -> State:
    """Attention of every row over the keys that the table names: (o_THD, lse_TH), fp32 accumulators.

    `q_THD` is bf16, fp16 or fp32. `k` and `v` are storages [K, P, D], head-major, of q's dtype, or both `Quantized`
    of the same format (scores are multiplied by the key's scale, weights by the value's). Key and value dims may
    differ, up to 256. Any strides but the last. Rows that see no key have o = 0 and lse = -inf; what lies in free
    slots, even NaN, has no effect. With `into` the result is merged into those accumulators, which must cover other
    keys, and they are returned.

    Equivalent to `reference_attention` over the same keys (causal by token index), then `merge_attention_states`.
    A row's result does not depend on the other sequences of the batch, to the last bit. A sink is not merged here:
    once per row, where the row lives, by `merge_sink`.

    Raises an ArgumentError that names what does not fit. Reads nothing back from the device.
    """
    _check(q_THD, k, v, table, spec)
    device = q_THD.device
    state = into or new_state(table.rows, spec.num_heads, spec.value_dim, q_THD.dtype, device)
    for name, tensor, shape in (("into[0]", state[0], (table.rows, spec.num_heads, spec.value_dim)),
                                ("into[1]", state[1], (table.rows, spec.num_heads))):
        check_tensor(name, tensor, shape, [torch.float32], device)
    check_rows_contiguous("into[0]", state[0])
    if not table.tiles:
        return state
    # The interpreter has no device, and needs no particular tiles.
    capability = (0, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    for launch in attention_launches(q_THD, k, v, table, spec, state, capability):
        launch.run()
    return state


def attention_launches(q_THD: Tensor, k: Storage, v: Storage, table: PagedTable, spec: AttentionSpec, state: State,
                       capability: tuple[int, int]) -> list[Launch]:
    """`triton_attend` on a device of this compute capability, not started, arguments not checked."""
    device = q_THD.device
    scratch = (torch.empty(table.scratch_rows, spec.num_heads, spec.value_dim, device=device),
               torch.empty(table.scratch_rows, spec.num_heads, device=device))
    launches = [_tiles_launch(q_THD, k, v, table, tiles, spec, scratch if tiles.split else state, capability)
                for tiles in table.tiles]
    if len(table.reduction_RF):
        o_THD, lse_TH = state
        launches.append(Launch(
            reduction_kernel, (len(table.reduction_RF), spec.num_heads),
            (*scratch, table.reduction_RF, o_THD, *o_THD.stride()[:2], lse_TH, *lse_TH.stride()),
            {"HEADS": spec.num_heads, "DIM": spec.value_dim, "PADDED_DIM": triton.next_power_of_2(spec.value_dim),
             "PARTIALS": REDUCED_PARTIALS}))
    return launches


def _tiles_launch(q_THD: Tensor, k: Storage, v: Storage, table: PagedTable, tiles: TileItems, spec: AttentionSpec,
                  target: State, capability: tuple[int, int]) -> Launch:
    k_KPD, k_scale, k_scale_stride = _pointers(k)
    v_KPD, v_scale, v_scale_stride = _pointers(v)
    o, lse = target
    padded_key_dim, padded_value_dim = (max(16, triton.next_power_of_2(dim)) for dim in (spec.key_dim, spec.value_dim))
    tiling = attention_tiling(tiles.tile_rows, max(padded_key_dim, padded_value_dim), q_THD.element_size(),
                              isinstance(k, Quantized), capability)
    format_ = storage_format(k, capability)
    return Launch(
        paged_attention_kernel, (len(tiles.items_NF), spec.num_kv_heads),
        (q_THD, *q_THD.stride()[:2], k_KPD, *k_KPD.stride()[:2], k_scale, k_scale_stride,
         v_KPD, *v_KPD.stride()[:2], v_scale, v_scale_stride,
         table.row_index_T, table.first_B, table.length_B, table.offset_B, tiles.items_NF,
         o, *o.stride()[:2], lse, *lse.stride(), spec.scale, spec.softcap or 0.0, spec.window or 0),
        {"GROUP": table.group, "KEY_DIM": spec.key_dim, "PADDED_KEY_DIM": padded_key_dim,
         "VALUE_DIM": spec.value_dim, "PADDED_VALUE_DIM": padded_value_dim, "BLOCK_SIZE": table.block_size,
         "TILE_ROWS": tiles.tile_rows, "TILE_KEYS": tiling.tile_keys, "FORMAT": format_,
         "CODE_UNIT": CODE_UNIT[format_], "WINDOWED": spec.window is not None,
         "SOFTCAPPED": spec.softcap is not None, "CONTINUE": not tiles.split,
         "UPCAST": INTERPRETED and q_THD.dtype == torch.bfloat16, "PRECISION": fp32_precision(capability)},
        tiling.num_warps, tiling.num_stages)


def storage_format(storage: Storage, capability: tuple[int, int]) -> int:
    """How the kernel reads this storage on a device of this compute capability."""
    if isinstance(storage, Tensor):
        return int(PLAIN)
    if storage.codes_KPD.dtype == torch.int8:
        return int(INT8)
    return int(FP8_IN_HARDWARE if capability >= (8, 9) else FP8_BY_BITS)


def _pointers(storage: Storage) -> tuple[Tensor, Tensor | None, int]:
    """(elements, scales, distance from one head's scales to the next's)."""
    if isinstance(storage, Tensor):
        return storage, None, 0
    return code_bytes(storage), storage.scale_KP, storage.scale_KP.stride(0)


def _check(q_THD: Tensor, k: Storage, v: Storage, table: PagedTable, spec: AttentionSpec) -> None:
    check_device("q_THD", q_THD)
    check_tensor("q_THD", q_THD, (table.rows, spec.num_heads, spec.key_dim), QUERY_DTYPES, q_THD.device)
    check_rows_contiguous("q_THD", q_THD)
    if max(spec.key_dim, spec.value_dim) > LARGEST_DIM:
        raise ShapeError("spec", f"of dims {spec.key_dim} and {spec.value_dim}", f"at most {LARGEST_DIM}")
    made_for = (table.window, table.group, table.key_dim, table.value_dim)
    wanted = (spec.window, spec.num_heads // spec.num_kv_heads, spec.key_dim, spec.value_dim)
    if made_for != wanted:
        raise ShapeError("table", f"made for (window, query heads per kv head, dims) {made_for}",
                         f"{wanted}, as in spec")
    for name, storage, dim in (("k", k, spec.key_dim), ("v", v, spec.value_dim)):
        if isinstance(storage, Quantized):
            check_quantized(name, storage, spec.num_kv_heads, dim, q_THD.device)
        else:
            check_tensor(name, storage, (spec.num_kv_heads, None, dim), [q_THD.dtype], q_THD.device)
            check_rows_contiguous(name, storage)
        tokens = (storage.codes_KPD if isinstance(storage, Quantized) else storage).shape[1]
        if tokens < table.storage_tokens:
            raise ShapeError(name, f"of {tokens} tokens", f"at least {table.storage_tokens}, as the table reads")
    if isinstance(k, Quantized) != isinstance(v, Quantized) or (
            isinstance(k, Quantized) and isinstance(v, Quantized) and k.codes_KPD.dtype != v.codes_KPD.dtype):
        raise DtypeError("v", "of another format than k", "both plain, both int8 or both fp8")
    check_tensor("table.row_index_T", table.row_index_T, (table.rows,), [torch.int32], q_THD.device)
