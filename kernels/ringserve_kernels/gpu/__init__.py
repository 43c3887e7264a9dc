"""Attention on GPUs: keys token after token, read in blocks by Triton's kernels and in long runs by the dense operation
that is fastest here.

`dense` operations that attend to a rectangle, and which are installed · `layout` how a plan is dealt to them ·
`candidates` what could serve on this device, and what could not.
"""
