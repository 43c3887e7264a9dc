"""How a request may be queued: what is accepted, what is refused, and what the refusal says."""

import math
from typing import Any

import msgspec
import pytest

from ringserve.errors import InvalidValueError
from ringserve.scheduling_params import MAX_NAME, MAX_PRIORITY, SchedulingParams
from tests.ringserve.fake_ranks import Driven


@pytest.mark.parametrize(("field", "values"), [
    ("tenant", ["", "a", "é", "\0", "a=b", " ", "x" * MAX_NAME, "\U0001f600" * MAX_NAME]),
    ("cache_salt", ["", "a", "x" * MAX_NAME]),
    ("priority", [-MAX_PRIORITY, 0, MAX_PRIORITY]),
    ("deadline_s", [None, 1e-9, 1, 0.5, 1e9]),
])
def test_what_can_work_is_accepted(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SchedulingParams(**{field: value}), field) == value


@pytest.mark.parametrize(("field", "values"), [
    ("tenant", ["x" * (MAX_NAME + 1)]),
    ("cache_salt", ["x" * (MAX_NAME + 1), "x" * 10**6]),
    ("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 10**30]),
    ("deadline_s", [0, 0.0, -0.0, -1, math.nan, math.inf, -math.inf]),
])
def test_what_cannot_work_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidValueError, match=field) as refused:
            SchedulingParams(**{field: value})
        assert refused.value.param == field
        assert len(refused.value.message) <= 300


@pytest.mark.parametrize(("field", "values"), [
    ("tenant", [None, 3, b"a"]), ("cache_salt", [None, 3, ["a"]]), ("priority", [None, "1", 0.5, math.nan]),
    ("deadline_s", ["1", [1.0]]),
])
def test_values_of_another_type_are_refused_by_name(field: str, values: list[Any]) -> None:
    """A Struct checks types when it is decoded, not when it is made."""
    for value in values:
        with pytest.raises(InvalidValueError) as refused:
            SchedulingParams(**{field: value})
        assert refused.value.param == field


@pytest.mark.parametrize("field", ["tenant", "cache_salt"])
def test_a_text_that_is_no_unicode_is_refused_by_name(field: str) -> None:
    """Half a surrogate pair has no bytes: it could neither be hashed nor sent."""
    with pytest.raises(InvalidValueError) as refused:
        SchedulingParams(**{field: "a\ud800"})
    assert refused.value.param == field


def test_parameters_cross_processes_unchanged() -> None:
    params = SchedulingParams(tenant="é", priority=-3, deadline_s=2.5, cache_salt="s")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SchedulingParams) == params


@pytest.mark.parametrize("values", [{"priority": 99}, {"deadline_s": 0.0}, {"tenant": "x" * 300}, {"priority": 0.5}])
def test_parameters_that_cannot_work_do_not_cross(values: dict[str, Any]) -> None:
    with pytest.raises((InvalidValueError, msgspec.ValidationError)):
        msgspec.msgpack.decode(msgspec.msgpack.encode(values), type=SchedulingParams)


def test_a_lower_priority_number_is_sooner_and_a_wish_of_ones_own_is_kept() -> None:
    driven = Driven(slots=100)
    deadlines = {}
    for priority in (-8, -1, 0, 1, 8):
        request = driven.add(f"p{priority}", range(40), scheduling=SchedulingParams(priority=priority))
        deadlines[priority] = request.deadline
    assert list(deadlines) == sorted(deadlines, key=lambda p: deadlines[p])
    assert deadlines[1] == pytest.approx(2 * deadlines[0], rel=1e-6)
    assert deadlines[-8] == pytest.approx(deadlines[0] / 256, rel=1e-5)
    driven.now = 5.0
    for wish in (0.25, 1e9):
        request = driven.add(f"w{wish}", range(40), scheduling=SchedulingParams(deadline_s=wish, priority=3))
        assert request.deadline == pytest.approx(5.0 + wish, abs=1e-6)
    driven.finish()
