"""The C++ kernel: attention over blocks of the cache as they lie, compiled for this CPU at first use.

`variants` what can be compiled for which CPU · `build` compiles and caches · `library` the compiled kernel from
Python · `layout` blocks as it reads them · `attention.cpp` tasks, strips and the online softmax · `product.h` products
in vectors · `tiles.h` products in AMX tiles · `simd.h` vectors and formats · `attention.h` what crosses the border.
"""
