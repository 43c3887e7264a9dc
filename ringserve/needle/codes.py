"""Two codes for every token: a short one to compare contexts by, a long one to read an answer from.

unit code      8 dims, from the E8 lattice's shell of squared norm 6: 6720 vectors, coordinates multiples of 1/2,
               inner products whole numbers, at most 5 between two of them
identity code  64 signs, from the extended BCH code [64, 16, 24]: inner products at most 16 in magnitude
"""

import itertools
import random

import numpy as np
from numpy.typing import NDArray

UNIT_DIMS = 8
UNIT_NORM = 6
MOST_ALIKE_FIRST = 3
"""Largest inner product of two codes of the first ids: digits and marks tell the keys of many needles apart."""
IDENTITY_DIMS = 64
MOST_ALIKE = 16
"""Largest |inner product| of two identity codes: a cosine of 1/4."""
IDENTITY_BITS = 13
"""Dimension of the subcode used: 8192 words, no two of them opposite (the word of ones is not among them)."""
BCH_GENERATOR = 0o6331141367235453
"""Generator polynomial of the binary BCH code (63, 16) of distance 23, bit i the coefficient of x^i."""

Array = NDArray[np.float32]


def unit_codes(count: int) -> Array:
    """[count, 8]: vectors of squared norm 6 with coordinates all whole or all half and an even sum."""
    shell = np.concatenate([_shell((-2, -1, 0, 1, 2)), _shell((-1.5, -0.5, 0.5, 1.5))])
    assert len(shell) == 6720 and count <= len(shell), (len(shell), count)
    # Spread over the shell, so that tokens of neighbouring ids are no more alike than others.
    random.Random(0).shuffle(order := list(range(len(shell))))
    shell = shell[order]
    apart = np.zeros(len(shell), dtype=bool)
    for i, code in enumerate(shell):
        apart[i] = not np.any(shell[:i][apart[:i]] @ code > MOST_ALIKE_FIRST)
    return np.concatenate([shell[apart], shell[~apart]])[:count]


def _shell(coordinates: tuple[float, ...]) -> Array:
    """The vectors of squared norm 6 and even sum with these coordinates, in lexicographic order."""
    vectors = np.array(list(itertools.product(coordinates, repeat=UNIT_DIMS)), dtype=np.float32)
    kept: Array = vectors[((vectors**2).sum(1) == UNIT_NORM) & (vectors.sum(1) % 2 == 0)]
    return kept


def identity_codes(count: int) -> Array:
    """[count, 64] of +-1: word i is the polynomial i(x) g(x) and its parity; a bit 0 is +1, a bit 1 is -1."""
    assert count <= 1 << IDENTITY_BITS, count
    shifts = np.array([BCH_GENERATOR << i for i in range(IDENTITY_BITS)], dtype=np.uint64)
    rows = (shifts[:, None] >> np.arange(IDENTITY_DIMS - 1, dtype=np.uint64)) & np.uint64(1)
    numbers = np.arange(count, dtype=np.uint64)
    messages = (numbers[:, None] >> np.arange(IDENTITY_BITS, dtype=np.uint64)) & np.uint64(1)
    words = messages @ rows % np.uint64(2)
    words = np.concatenate([words, words.sum(1, keepdims=True) % np.uint64(2)], axis=1)
    return 1 - 2 * words.astype(np.float32)
