"""Which sampling parameters are accepted, which are refused, and what the refusal says."""

import math
from typing import Any

import msgspec
import pytest

from ringserve.errors import InvalidValueError
from ringserve.sampling_params import MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_STRINGS, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(("field", "values"), [
    ("max_tokens", [None, 1, 2**31 - 1]),
    ("min_tokens", [0, 16]),
    ("temperature", [0, 0.0, 1e-6, 100]),
    ("top_k", [-1, 0, 1, 10**6]),
    ("top_p", [1e-9, 0.5, 1]),
    ("min_p", [0, 0.5, 1]),
    ("seed", [None, 0, -(2**63), 2**63 - 1]),
    ("presence_penalty", [-2, 0, 2]),
    ("frequency_penalty", [-2, 0, 2]),
    ("repetition_penalty", [0.01, 1, 100]),
    ("logit_bias", [{}, {0: -100.0, 5: 100.0}]),
    ("stop", [(), ("x",) * MAX_STOP_STRINGS, ("x" * MAX_STOP_LENGTH,)]),
    ("stop_token_ids", [(), (0, 2**31 - 1)]),
    ("logprobs", [None, 0, MAX_LOGPROBS]),
])
def test_what_can_work_is_accepted(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "values"), [
    ("max_tokens", [0, -1, 2**31]),
    ("min_tokens", [-1, 17, 2**31]),
    ("temperature", [-0.1, 100.1, NAN, INF]),
    ("top_k", [-2, 2**31]),
    ("top_p", [0, -0.1, 1.1, NAN]),
    ("min_p", [-0.1, 1.1, NAN]),
    ("seed", [2**63, -(2**63) - 1]),
    ("presence_penalty", [-2.1, 2.1, NAN, INF]),
    ("frequency_penalty", [-2.1, 2.1, NAN, -INF]),
    ("repetition_penalty", [0, -1, 100.1, NAN]),
    ("logit_bias", [{-1: 0.0}, {2**31: 0.0}, {0: 100.5}, {0: NAN}, {0: INF}]),
    ("stop", [("",), ("x",) * (MAX_STOP_STRINGS + 1), ("x" * (MAX_STOP_LENGTH + 1),)]),
    ("stop_token_ids", [(-1,), (2**31,)]),
    ("logprobs", [-1, MAX_LOGPROBS + 1]),
])
def test_what_cannot_work_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidValueError, match=field) as refused:
            SamplingParams(**{field: value})
        assert refused.value.param == field
        assert len(refused.value.message) <= 300


def test_min_tokens_is_free_when_the_context_is_the_limit() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000


def test_zero_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.01).greedy


def test_parameters_cross_processes_unchanged() -> None:
    params = SamplingParams(max_tokens=None, stop=("a", "é"), stop_token_ids=(3,), logit_bias={7: -1.5}, seed=-4,
                            logprobs=3, temperature=0.7)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_parameters_that_cannot_work_do_not_cross() -> None:
    with pytest.raises(InvalidValueError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"top_p": 3.0}), type=SamplingParams)
