"""NativeKernel: the compiled C++ kernel from Python. Structures mirror attention.h field by field.

Shape suffixes: T rows, H query heads, K kv heads, P tokens of the storage, D head dim.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ringserve_kernels.errors import KernelUnavailable
from ringserve_kernels.plan_table import PlanTable
from ringserve_kernels.spec import AttentionSpec

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}

_INT, _PTR, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class _Attention(ctypes.Structure):
    _fields_ = [
        ("q", _PTR), ("q_format", _INT), ("q_row_stride", _INT), ("q_head_stride", _INT),
        ("k", _PTR), ("v", _PTR), ("kv_format", _INT), ("k_head_stride", _INT), ("v_head_stride", _INT),
        ("k_scale", _PTR), ("v_scale", _PTR), ("scale_head_stride", _INT),
        ("o", _PTR), ("o_row_stride", _INT), ("o_head_stride", _INT),
        ("lse", _PTR), ("lse_row_stride", _INT), ("lse_head_stride", _INT),
        ("heads", _INT), ("kv_heads", _INT), ("key_dim", _INT), ("value_dim", _INT), ("block", _INT),
        ("sequences", _INT), ("row_start", _PTR), ("row_count", _PTR), ("index_start", _PTR), ("row_index", _PTR),
        ("block_start", _PTR), ("first", _PTR), ("length", _PTR), ("place", _PTR),
        ("window", _INT), ("scale", _REAL), ("softcap", _REAL), ("threads", _INT)]


class _Store(ctypes.Structure):
    _fields_ = [
        ("source", _PTR), ("target", _PTR), ("where", _PTR), ("element_size", _INT), ("pack", _INT), ("heads", _INT),
        ("tokens", _INT), ("dim", _INT), ("block", _INT), ("target_tokens", _INT), ("source_head_stride", _INT),
        ("source_token_stride", _INT), ("target_head_stride", _INT), ("is_value", _INT), ("threads", _INT)]


class NativeKernel:
    """One compiled variant. Raises KernelUnavailable when it cannot be loaded or this process may not use it."""

    def __init__(self, library: Path) -> None:
        self.file = library
        try:
            self._library = ctypes.CDLL(str(library))
        except OSError as error:
            raise KernelUnavailable(f"{library} cannot be loaded: {error}") from None
        self._library.ringserve_attend.argtypes, self._library.ringserve_attend.restype = [_PTR], None
        self._library.ringserve_store.argtypes, self._library.ringserve_store.restype = [_PTR], _INT
        self._library.ringserve_threads.restype = _INT
        self._library.ringserve_variant.restype = ctypes.c_char_p
        self.name: str = self._library.ringserve_variant().decode()
        refused = self._library.ringserve_prepare()
        if refused:
            raise KernelUnavailable(f"the system does not let this process use {self.name} (error {refused})")

    def shares_threads_with_torch(self) -> bool:
        """Whether its threads are torch's own: both would otherwise spin on the same cores."""
        return int(self._library.ringserve_threads()) == torch.get_num_threads()

    def attend(self, q_THD: Tensor, k_KPD: Tensor, v_KPD: Tensor, scales: tuple[Tensor, Tensor] | None, block: int,
               table: PlanTable, spec: AttentionSpec, o_THD: Tensor, lse_TH: Tensor) -> None:
        """Attention of the table's rows over its blocks, merged into the accumulators. Arguments are checked by
        `attend` and by who made them."""
        if table.is_empty:
            return
        if q_THD.stride(2) != 1:
            q_THD = q_THD.contiguous()
        k_scale, v_scale = scales or (None, None)
        call = _Attention(
            q=q_THD.data_ptr(), q_format=FORMATS[q_THD.dtype], q_row_stride=q_THD.stride(0),
            q_head_stride=q_THD.stride(1), k=k_KPD.data_ptr(), v=v_KPD.data_ptr(), kv_format=FORMATS[k_KPD.dtype],
            k_head_stride=k_KPD.stride(0), v_head_stride=v_KPD.stride(0),
            k_scale=None if k_scale is None else k_scale.data_ptr(),
            v_scale=None if v_scale is None else v_scale.data_ptr(),
            scale_head_stride=0 if k_scale is None else k_scale.stride(0),
            o=o_THD.data_ptr(), o_row_stride=o_THD.stride(0), o_head_stride=o_THD.stride(1),
            lse=lse_TH.data_ptr(), lse_row_stride=lse_TH.stride(0), lse_head_stride=lse_TH.stride(1),
            heads=spec.num_heads, kv_heads=spec.num_kv_heads, key_dim=spec.key_dim, value_dim=spec.value_dim,
            block=block, sequences=len(table.row_start), row_start=table.row_start.ctypes.data,
            row_count=table.row_count.ctypes.data, index_start=table.index_start.ctypes.data,
            row_index=table.row_index.ctypes.data, block_start=table.block_start.ctypes.data,
            first=table.first.ctypes.data, length=table.length.ctypes.data, place=table.place.ctypes.data,
            window=table.window or 0, scale=spec.scale, softcap=spec.softcap or 0.0, threads=torch.get_num_threads())
        self._library.ringserve_attend(ctypes.byref(call))

    def store(self, source_KTD: Tensor, target_KPD: Tensor, where_T: Tensor, *, block: int, pack: int,
              is_value: bool) -> int | None:
        """Write tokens into blocks as `attend` reads them. `where_T` int64: token offsets in the storage; the first
        that is not in it is returned, and nothing is written then."""
        if source_KTD.stride(2) != 1:
            source_KTD = source_KTD.contiguous()
        where_T = where_T.contiguous()
        heads, tokens, dim = source_KTD.shape
        call = _Store(
            source=source_KTD.data_ptr(), target=target_KPD.data_ptr(), where=where_T.data_ptr(),
            element_size=source_KTD.element_size(), pack=pack, heads=heads, tokens=tokens, dim=dim, block=block,
            target_tokens=target_KPD.shape[1],
            source_head_stride=source_KTD.stride(0), source_token_stride=source_KTD.stride(1),
            target_head_stride=target_KPD.stride(0), is_value=int(is_value), threads=torch.get_num_threads())
        bad = int(self._library.ringserve_store(ctypes.byref(call)))
        return int(where_T[bad]) if bad >= 0 else None
