"""What a caller may ask for beside the prompt, by name, as the messages that carry it."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypedDict

from google.protobuf.duration_pb2 import Duration

from ringserve.client.errors import invalid
from ringserve.v1 import inference_pb2 as pb

SAMPLING = tuple(pb.Sampling.DESCRIPTOR.fields_by_name)
SCHEDULING = ("priority", "cache_salt", "deadline_s")


class Options(TypedDict, total=False):
    """The fields of Sampling and Scheduling. What is unset, or None, takes the model's own default."""

    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_string: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    logprobs: int | None
    priority: int | None
    """Negative is more urgent."""
    cache_salt: str | None
    """Prompts share computed blocks only with prompts of the same salt."""
    deadline_s: float | None
    """The whole answer is wanted within this time; otherwise the request is refused, or cancelled."""


def sampling_of(options: Options) -> pb.Sampling:
    sampling = pb.Sampling()
    for name in SAMPLING:
        value: Any = options.get(name)
        if value is not None:
            value = [value] if name == "stop" and isinstance(value, str) else value
            try:
                sampling.MergeFrom(pb.Sampling(**{name: value}))
            except (TypeError, ValueError) as error:
                raise invalid(f"{name}: {error}", name) from None
    return sampling


def scheduling_of(options: Options) -> pb.Scheduling:
    try:
        scheduling = pb.Scheduling(priority=options.get("priority"), cache_salt=options.get("cache_salt"))
    except (TypeError, ValueError) as error:
        raise invalid(f"priority and cache_salt are an integer and a text: {error}", "priority") from None
    if (deadline_s := options.get("deadline_s")) is not None:
        scheduling.deadline.CopyFrom(duration_of(deadline_s, "deadline_s"))
    return scheduling


def duration_of(seconds: float, name: str) -> Duration:
    duration = Duration()
    try:
        duration.FromTimedelta(timedelta(seconds=seconds))
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid(f"{name} is a number of seconds, got {seconds!r}", name) from error
    return duration


def check_names(options: Mapping[str, object]) -> None:
    """A misspelt option must not be ignored."""
    for name in options:
        if name not in SAMPLING and name not in SCHEDULING:
            raise TypeError(f"unexpected keyword argument {name!r}")


def messages_of(messages: Sequence[Mapping[str, str]]) -> list[pb.ChatMessage]:
    try:
        return [pb.ChatMessage(**message) for message in messages]
    except (TypeError, ValueError) as error:
        raise invalid(f"messages are dicts of a role and a content: {error}", "messages") from None
