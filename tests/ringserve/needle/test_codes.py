"""What the construction rests on, for all pairs of codes."""

import numpy as np
import torch

from ringserve.needle.codes import (
    IDENTITY_DIMS,
    MOST_ALIKE,
    UNIT_DIMS,
    UNIT_NORM,
    identity_codes,
    unit_codes,
)
from ringserve.needle.weights import VOCABULARY


def largest_product(codes: np.ndarray, *, absolute: bool) -> float:
    """The largest inner product (or its absolute value) of two different rows."""
    largest = -np.inf
    for begin in range(0, len(codes), 512):
        products = codes[begin:begin + 512] @ codes.T
        rows = np.arange(len(products))
        products[rows, begin + rows] = 0
        largest = max(largest, float((np.abs(products) if absolute else products).max()))
    return largest


def test_unit_codes_all_have_norm_6_and_any_two_an_inner_product_of_at_most_5() -> None:
    codes = unit_codes(6720)  # the whole shell
    assert codes.shape == (6720, UNIT_DIMS)
    assert UNIT_NORM == 6 and np.all((codes**2).sum(axis=1) == UNIT_NORM)
    assert largest_product(codes, absolute=False) == 5


def test_identity_codes_are_signs_of_which_any_two_are_at_most_a_quarter_alike() -> None:
    codes = identity_codes(VOCABULARY)
    assert codes.shape == (VOCABULARY, IDENTITY_DIMS)
    assert np.all(np.abs(codes) == 1)
    assert largest_product(codes, absolute=True) <= MOST_ALIKE == IDENTITY_DIMS / 4


def test_codes_are_exact_in_bf16() -> None:
    for codes in (unit_codes(VOCABULARY), identity_codes(VOCABULARY)):
        exact = torch.from_numpy(codes)
        assert torch.equal(exact.bfloat16().float(), exact)


def test_more_tokens_do_not_change_the_codes_of_the_first() -> None:
    assert np.array_equal(unit_codes(100), unit_codes(VOCABULARY)[:100])
    assert np.array_equal(identity_codes(100), identity_codes(VOCABULARY)[:100])
