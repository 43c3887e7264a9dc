"""Options that cannot work are refused with the numbers; every error knows its word."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from ringserve import errors
from ringserve.config import CacheConfig, EngineConfig, ModelConfig, RingConfig, SchedulerConfig
from ringserve.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    InvalidValueError,
    RequestError,
    RingserveError,
    StartupError,
)


@pytest.mark.parametrize(("kind", "field", "value"), [
    (ModelConfig, "model", ""),
    (ModelConfig, "max_model_len", 0),
    (CacheConfig, "block_size", 0),
    (CacheConfig, "block_size", 4097),
    (CacheConfig, "kv_cache_gib", 0.0),
    (RingConfig, "ring_size", 0),
    (RingConfig, "ring_size", 65),
    (RingConfig, "threads_per_rank", 0),
    (RingConfig, "ring_segment", 0),
    (RingConfig, "ring_timeout_s", 0.0),
    (RingConfig, "step_timeout_s", -1.0),
    (SchedulerConfig, "max_chunk_tokens", 0),
    (SchedulerConfig, "max_running_requests", 0),
    (SchedulerConfig, "max_waiting_requests", 0),
    (SchedulerConfig, "output_reserve", 0),
    (ModelConfig, "dtype", "int3"),
    (CacheConfig, "block_size", 2.5),
    (CacheConfig, "block_size", True),
    (CacheConfig, "kv_cache_gib", "1"),
    (RingConfig, "ring_size", "2"),
    (RingConfig, "ring_mode", "pass"),
    (RingConfig, "device", "tpu"),
    (RingConfig, "transport", "carrier-pigeon"),
    (SchedulerConfig, "max_chunk_tokens", 10.0),
])
def test_a_value_that_cannot_work_is_refused_by_name(kind: type, field: str, value: Any) -> None:
    options = {"model": "m"} if kind is ModelConfig else {}
    with pytest.raises(ConfigError, match="model" if field == "model" else field) as refused:
        kind(**{**options, field: value})
    if value:
        assert str(value) in refused.value.message


def test_no_more_requests_run_than_a_chunk_has_tokens() -> None:
    assert SchedulerConfig(max_chunk_tokens=8, max_running_requests=9).most_running == 8
    assert SchedulerConfig(max_chunk_tokens=9, max_running_requests=8).most_running == 8


def test_a_configuration_crosses_processes_unchanged() -> None:
    config = EngineConfig(model=ModelConfig(model="m", max_model_len=5), ring=RingConfig(ring_size=3),
                          cache=CacheConfig(block_size=16, kv_cache_gib=0.5))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def every_error() -> Iterator[type[RingserveError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, RingserveError):
            yield value


def test_every_error_stands_in_the_tree_at_the_top_of_the_file() -> None:
    assert errors.__doc__ is not None
    for kind in every_error():
        assert kind.__name__ in errors.__doc__
        assert kind.code and kind.code == kind.code.lower()


def test_the_type_says_whose_fault_it_is() -> None:
    for kind in every_error():
        if kind is not RingserveError:
            assert sum(issubclass(kind, side) for side in (StartupError, RequestError, EngineError)) == 1


def test_errors_carry_what_clients_need() -> None:
    too_long = ContextLengthError(100, 20, 110)
    assert too_long.param == "prompt" and too_long.code == "context_length_exceeded"
    assert "110" in too_long.message and "120" in too_long.message
    assert InvalidValueError("no", "top_p").param == "top_p"
    assert EngineDeadError("gone", 3).rank == 3
    assert ConfigError().message == "config_error"
