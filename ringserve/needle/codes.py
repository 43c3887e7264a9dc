"""Two codes for every token: a short one to compare contexts by, a long one to read an answer from.

unit code      8 dims, from the E8 lattice's shell of norm 6: 6720 vectors, inner products at most 5, coordinates
               multiples of 1/2: sums of products are exact in bf16
identity code  64 signs, any two at most half alike: read by the head
"""

import itertools
import random

import numpy as np
from numpy.typing import NDArray

UNIT_DIMS = 8
UNIT_NORM = 6
IDENTITY_DIMS = 64
MOST_ALIKE = 32
"""Largest |inner product| of two identity codes: a cosine of 1/2."""


def unit_codes(count: int) -> NDArray[np.float32]:
    """[count, 8]: vectors of squared norm 6 of the E8 lattice (all coordinates whole or all half, sum even)."""
    whole = [v for values in ((2, 1, 1, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1, 0, 0)) for v in _signed(values)
             if sum(v) % 2 == 0]
    half = [tuple(x / 2 for x in v) for v in _signed((3, 3, 1, 1, 1, 1, 1, 1)) if sum(v) % 4 == 0]
    shell = np.array(sorted(whole) + sorted(half), dtype=np.float32)
    assert len(shell) == 6720 and count <= len(shell), (len(shell), count)
    # Spread over the shell, so that tokens of neighbouring ids are no more alike than others.
    order = list(range(len(shell)))
    random.Random(0).shuffle(order)
    return shell[order[:count]]


def _signed(values: tuple[int, ...]) -> set[tuple[float, ...]]:
    """All arrangements of these magnitudes with all signs."""
    found: set[tuple[float, ...]] = set()
    for places in set(itertools.permutations(values)):
        used = [i for i, v in enumerate(places) if v]
        for signs in itertools.product((1, -1), repeat=len(used)):
            vector = [0.0] * len(places)
            for i, sign in zip(used, signs):
                vector[i] = sign * places[i]
            found.add(tuple(vector))
    return found


def identity_codes(count: int) -> NDArray[np.float32]:
    """[count, 64] of +-1, drawn one by one; a draw too like or too unlike an earlier one is drawn again."""
    rng = random.Random(0)
    words = np.zeros(count, dtype=np.uint64)
    found = 0
    while found < count:
        word = np.uint64(rng.getrandbits(IDENTITY_DIMS))
        distance = np.bitwise_count(words[:found] ^ word).astype(np.int64)
        if np.all(np.abs(IDENTITY_DIMS - 2 * distance) <= MOST_ALIKE):
            words[found] = word
            found += 1
    bits = (words[:, None] >> np.arange(IDENTITY_DIMS, dtype=np.uint64)) & np.uint64(1)
    return (2.0 * bits - 1.0).astype(np.float32)
