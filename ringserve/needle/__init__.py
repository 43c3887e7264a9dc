"""needle: a transformer that ships with ringserve. Its weights are constructed; it continues a text with what
followed the matching recent context, at any distance.

    residual (256)   | slots 0..7: 8 codes of 8 | identity 64 | out 64 | ballast 12 | 0 |

    layer 0  window  code of t-1 -> slot 1        code of t-2   -> slot 2       slots 0..2 hold t .. t-2
    layer 1  window  slots of t-3 -> slots 3..5   slots of t-6  -> slots 6, 7   slots 0..7 hold t .. t-7
    layer 2  global  q = slots 0..6: the latest seven tokens
                     k = slots 1..7: the seven tokens before this one          -> out
                     v = identity code of this token
    head     reads `out` by the tokens' identity codes

The two heads of the windowed layers look at fixed distances, found by rotary angles. The global layer has no
positions. Before its first token a text reads as though that token had always been repeated.

Codes are multiples of 1/2, and ballast keeps the sum of squares of every row at 2^18, so that RMSNorm divides by
32: in fp32 and in bf16, in any order of summation, on any ring, the global scores are the same bits.

An induction head (Olsson et al. 2022, arXiv:2209.11895) over n-grams, in SmolLM3's architecture. Known limits:
what followed several equal contexts of seven tokens is averaged; five or more different answers blur into noise.
"""

from ringserve.needle.build import build_needle, needle_directory

__all__ = ["build_needle", "needle_directory"]
