"""Triton's kernels: numbers in its interpreter (on a GPU where there is one), and what ptxas makes of them."""
