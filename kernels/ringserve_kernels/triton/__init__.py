"""Triton kernels: paged attention with plain and quantized keys, merging, gathering, quantized writes.

Not imported by `ringserve_kernels`: `import ringserve_kernels.triton` needs the extra `ringserve[triton]`. On a machine
without a GPU the kernels run in Triton's interpreter when TRITON_INTERPRET=1 is set before triton is imported: slow,
for tests.
"""

from ringserve_kernels.errors import ArgumentError, DeviceError, DtypeError, ShapeError, StrideError
from ringserve_kernels.triton.attend import triton_attend
from ringserve_kernels.triton.gather import triton_gather
from ringserve_kernels.triton.merge import triton_merge
from ringserve_kernels.triton.quantized import Quantized, quantize_write
from ringserve_kernels.triton.table import PagedTable, page_table

__all__ = [
    "ArgumentError", "DeviceError", "DtypeError", "PagedTable", "Quantized", "ShapeError", "StrideError", "page_table",
    "quantize_write", "triton_attend", "triton_gather", "triton_merge",
]
