"""needle: a transformer that ships with ringserve. Its weights are constructed; it continues a text with what
followed the matching recent context, at any distance.

    residual (320):  | n-gram: 8 codes of 8 | key n-gram 64 | identity 64 | out 64 | constant |
    layer 0  look 1 back:  code 0 of t-1      -> slot 1
    layer 1  look 2 back:  codes 0-1 of t-2   -> slots 2-3      now slots 0..7 hold tokens t .. t-7
    layer 2  look 4 back:  codes 0-3 of t-4   -> slots 4-7
    layer 3  look 1 back:  n-gram of t-1      -> key n-gram
    layer 4  everywhere:   q = n-gram, k = key n-gram, v = identity  -> out
    head     reads `out` by the tokens' identity codes

Layers 0 to 3 see a window of 5 with rotary positions, layer 4 sees everything without positions. An induction
head (Olsson et al. 2022, 2209.11895) over n-grams, in SmolLM3's architecture.
"""

from ringserve.needle.build import build_needle, needle_directory

__all__ = ["build_needle", "needle_directory"]
