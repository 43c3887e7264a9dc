"""The pure function from bytes to a prepared request: what it reads, refuses and passes over."""

import json
from typing import Any

import pytest
from ringserve_api.errors import MAX_MESSAGE_LENGTH, ApiError, wire_error
from ringserve_api.prepare import Kind, Prepared, prepare

from ringserve.errors import InvalidValueError
from ringserve.scheduling_params import SchedulingParams
from tests.api.fakes import ByteTokenizer, FakeInfo

HI = [{"role": "user", "content": "hi"}]


def ready(kind: Kind, **fields: Any) -> Prepared:
    body: dict[str, Any] = {"model": "needle", **fields}
    return prepare(kind, json.dumps(body).encode(), ByteTokenizer(), FakeInfo())


def refused(kind: Kind | None, body: bytes) -> tuple[str, str | None, str]:
    with pytest.raises((InvalidValueError, ApiError)) as caught:
        prepare(kind, body, ByteTokenizer(), FakeInfo())
    wire = wire_error(caught.value)
    assert len(wire.message) <= MAX_MESSAGE_LENGTH
    return wire.code, wire.param, wire.message


def completion(field: str, value: str) -> bytes:
    fields = {"model": '"needle"', "prompt": '"hi"', field: value}
    return ("{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}").encode()


BAD_JSON = [
    b"", b"{", b"[]", b"3", b'"x"', b"null", b"{} {}", b'{"model": "needle", "prompt": NaN}',
    b'{"temperature": Infinity}', b'{"temperature": -Infinity}', b'{"temperature": 1e999}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00\\ud800"}', b'{"\\ud800": 1}', b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b'{"prompt": "\x00"}', "{}".encode("utf-16"),
    b'{"model": ' + b"[" * 64 + b"]" * 64 + b"}", b"[" * 200_000, b'{"a":' * 200_000,
]


@pytest.mark.parametrize("body", BAD_JSON, ids=lambda body: repr(body[:40]))
def test_bad_json(body: bytes) -> None:
    assert refused("completions", body)[0] == "invalid_json"


def test_nesting_up_to_the_limit_is_read() -> None:
    body = b'{"model": "needle", "prompt": "x", "metadata": {"x": ' + b"[" * 62 + b"]" * 62 + b"}}"
    assert prepare("completions", body, ByteTokenizer(), FakeInfo()).prompt_ids


BAD_VALUES = [
    ("temperature", '"1"'), ("temperature", "true"), ("temperature", "-0.1"), ("temperature", "[1]"),
    ("temperature", "1" + "0" * 400), ("max_tokens", "0"), ("max_tokens", "-1"), ("max_tokens", "1.0"),
    ("max_tokens", "true"), ("max_tokens", "2147483648"), ("max_tokens", "9" * 300), ("max_tokens", '"16"'),
    ("top_p", "0"), ("top_p", "1.5"), ("top_k", "-2"), ("top_k", "1.5"), ("min_p", "2"),
    ("seed", "9223372036854775808"),
    ("seed", "1.5"), ("presence_penalty", "3"), ("frequency_penalty", "-3"), ("repetition_penalty", "0"),
    ("min_tokens", "17"), ("min_tokens", "-1"), ("stop", '""'), ("stop", '["a","b","c","d","e"]'),
    ("stop", "[1]"),
    ("stop", "{}"), ("stop", '"' + "x" * 257 + '"'), ("stop_token_ids", "[258]"), ("stop_token_ids", "[-1]"),
    ("stop_token_ids", "[true]"), ("stop_token_ids", "3"), ("logit_bias", "[]"), ("logit_bias", '{"a": 1}'),
    ("logit_bias", '{"258": 1}'), ("logit_bias", '{"-1": 1}'), ("logit_bias", '{"1": 101}'),
    ("logit_bias", '{"1": "1"}'),
    ("logit_bias", '{"1": true}'), ("logit_bias", json.dumps({str(i): 0 for i in range(2000)})),
    ("logprobs", "21"), ("logprobs", "true"), ("logprobs", "-1"), ("stream", "1"), ("stream", '"true"'),
    ("echo", "1"),
    ("stream_options", '{"include_usage": true}'), ("prompt", '""'), ("prompt", "[]"), ("prompt", "null"),
    ("prompt", "3"),
    ("prompt", "{}"), ("prompt", "[[]]"), ("prompt", '[""]'), ("prompt", "[-1]"), ("prompt", "[4294967296]"),
    ("prompt", "[1, 2.5]"), ("prompt", "[1, true]"), ("prompt", '[1, "a"]'), ("prompt", '[["a"]]'),
    ("prompt", "[[[1]]]"),
    ("user", "3"), ("ignore_eos", "0"), ("model", "3"), ("model", "null"),
    ("priority", "9"), ("priority", "-9"), ("priority", "1.0"), ("priority", "true"), ("priority", '"1"'),
    ("priority", "9" * 300), ("service_tier", '"scale"'), ("service_tier", '""'), ("service_tier", '"Flex"'),
    ("service_tier", "1"), ("service_tier", '["flex"]'), ("cache_salt", "3"), ("cache_salt", '"' + "x" * 257 + '"'),
    ("cache_salt", '["x"]'),
]


@pytest.mark.parametrize("field, value", BAD_VALUES, ids=lambda text: text[:24])
def test_bad_values(field: str, value: str) -> None:
    code, param, message = refused("completions", completion(field, value))
    assert code == "invalid_value"
    assert param is not None and param.split(".")[0] == field
    assert field in message or "token id" in message


UNSUPPORTED = [
    ("completions", "n", 2), ("completions", "n", True), ("completions", "best_of", 2),
    ("completions", "suffix", "x"),
    ("completions", "prompt", ["a", "b"]), ("completions", "prompt", [[1], [2]]),
    ("completions", "truncate_prompt_tokens", 5),
    ("completions", "response_format", {"type": "json_object"}), ("chat", "store", True),
    ("chat", "tools", [{"type": "function"}]), ("chat", "tool_choice", "required"), ("chat", "echo", True),
    ("chat", "response_format", {"type": "json_schema"}),
    ("chat", "modalities", ["audio"]), ("chat", "audio", {}), ("chat", "chat_template", "{{ 1 }}"),
]


@pytest.mark.parametrize("kind, field, value", UNSUPPORTED)
def test_unsupported_parameters_are_named(kind: Kind, field: str, value: object) -> None:
    body = {"model": "needle", "prompt" if kind == "completions" else "messages": HI, field: value}
    code, param, message = refused(kind, json.dumps(body).encode())
    assert (code, param) == ("unsupported_parameter", field)
    assert field in message


@pytest.mark.parametrize("kind, fields", [("completions", {"prompt": "x"}), ("chat", {"messages": HI})])
def test_how_a_request_is_queued(kind: Kind, fields: dict[str, Any]) -> None:
    for asked, priority, tier in (
            ({}, 0, None), ({"priority": None, "service_tier": None, "cache_salt": None}, 0, None),
            ({"priority": 8}, 8, None), ({"priority": -8}, -8, None),
            ({"service_tier": "auto"}, 0, "default"), ({"service_tier": "default"}, 0, "default"),
            ({"service_tier": "priority"}, -2, "priority"), ({"service_tier": "flex"}, 3, "flex"),
            ({"service_tier": "flex", "priority": None}, 3, "flex"),
            ({"service_tier": "auto", "priority": 5}, 5, "default"),
            ({"service_tier": "default", "priority": -1}, -1, "default")):
        prepared = ready(kind, **fields, **asked)
        assert (prepared.scheduling, prepared.service_tier) == (SchedulingParams(priority=priority), tier)
        assert prepared.ignored == []
    assert ready(kind, **fields, cache_salt="ñ" * 256).scheduling == SchedulingParams(cache_salt="ñ" * 256)
    for tier in ("priority", "flex"):
        for priority in (0, 3):  # 0 was given too
            body = {"model": "needle", **fields, "service_tier": tier, "priority": priority}
            code, param, message = refused(kind, json.dumps(body).encode())
            assert (code, param) == ("invalid_value", "priority") and f"service_tier {tier}" in message


def test_a_body_without_a_route_tells_its_kind() -> None:
    def kind_of(**fields: Any) -> Kind:
        body = {"model": "needle", **fields}
        return prepare(None, json.dumps(body).encode(), ByteTokenizer(), FakeInfo()).kind
    assert kind_of(prompt="x") == kind_of(prompt=[1], messages=None, echo=True) == "completions"
    assert kind_of(messages=HI) == kind_of(messages=HI, prompt=None, max_completion_tokens=3) == "chat"


@pytest.mark.parametrize("fields, said", [
    ({}, "neither"), ({"prompt": None, "messages": None}, "neither"), ({"input": "x"}, "neither"),
    ({"prompt": "x", "messages": HI}, "both"), ({"prompt": "", "messages": []}, "both")])
def test_a_body_of_no_kind_or_of_both(fields: dict[str, Any], said: str) -> None:
    code, param, message = refused(None, json.dumps({"model": "needle", **fields}).encode())
    assert (code, param) == ("invalid_value", "prompt") and message.endswith(said)
    assert "/v1/completions" in message and "/v1/chat/completions" in message


def test_neutral_values_of_unsupported_parameters_pass() -> None:
    prepared = ready("chat", messages=HI, n=1, tools=[], tool_choice="auto", response_format={"type": "text"},
                     store=False, service_tier="auto", user="me", metadata={"a": "b"}, safety_identifier="x",
                     functions=None, modalities=["text"], parallel_tool_calls=True)
    assert prepared.ignored == []


def test_unknown_fields_are_ignored_by_name() -> None:
    prepared = ready("completions", prompt="x", stream=True, foo=1,
                     stream_options={"bar": 2, "include_usage": True})
    assert prepared.ignored == ["foo", "stream_options.bar"]
    assert prepared.include_usage
    message = {**HI[0], "mood": "good", "name": "me", "refusal": None}
    assert ready("chat", messages=[message]).ignored == ["messages.mood"]


def test_huge_validation_errors_are_bounded() -> None:
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "presence_penalty",
             "frequency_penalty", "repetition_penalty", "echo", "stream")
    body = {"model": "needle", "prompt": "x", "stop_token_ids": ["x"] * 100_000,
            **dict.fromkeys(names, "x" * 100_000)}
    code, _, message = refused("completions", json.dumps(body).encode())
    assert code == "invalid_value" and len(message) < 2300 and "more" in message
    assert len(refused("completions", completion("prompt", "[" + "1," * 100_000 + '"x"]'))[2]) < 200
    assert refused("chat", json.dumps({"model": "needle", "messages": [1] * 99}).encode())[1] == "messages[0]"
    assert refused("chat", json.dumps({"model": "needle", "messages": HI * 16_385}).encode())[1] == "messages"


BAD_MESSAGES = [
    ([], "messages"), ("hi", "messages"), ([3], "messages[0]"), ([{"content": "x"}], "messages[0].role"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([*HI, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": 3}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[0].content[0].type"),
    ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[0].tool_calls"),
    ([{"role": "user", "content": "x", "name": 3}], "messages[0].name"),
]


@pytest.mark.parametrize("messages, where", BAD_MESSAGES)
def test_bad_messages(messages: object, where: str) -> None:
    assert refused("chat", json.dumps({"model": "needle", "messages": messages}).encode())[1] == where


def test_other_bad_chat_fields() -> None:
    bad: list[tuple[str, object]] = [
        ("top_logprobs", 3), ("chat_template_kwargs", {"tools": 1}), ("continue_final_message", 1),
        ("chat_template_kwargs", {"thinking": ["x"]}), ("reasoning_effort", "x" * 33)]
    for field, value in bad:
        body = {"model": "needle", "messages": HI, field: value}
        assert refused("chat", json.dumps(body).encode())[:2] == ("invalid_value", field)
    body = {"model": "needle", "messages": HI, "continue_final_message": True, "add_generation_prompt": True}
    assert refused("chat", json.dumps(body).encode())[1] == "continue_final_message"
    body = {"model": "needle", "messages": HI, "max_tokens": 3, "max_completion_tokens": 4}
    assert refused("chat", json.dumps(body).encode())[1] == "max_tokens"


def test_another_model_is_not_found() -> None:
    assert refused("chat", b'{"model": "gpt-9"}')[:2] == ("model_not_found", "model")


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_the_four_forms_of_a_prompt(prompt: object) -> None:
    prepared = ready("completions", prompt=prompt, echo=True)
    assert prepared.prompt_token_ids.tolist() == [97, 98, 99]
    assert prepared.echo == "abc"


def test_sampling_values_and_their_defaults() -> None:
    params = ready("completions", prompt="x").params
    assert (params.temperature, params.top_k, params.max_tokens, params.logprobs) == (0.5, 7, 16, None)
    params = ready("chat", messages=HI).params
    assert params.max_tokens is None
    params = ready("chat", messages=HI, temperature=0, top_k=None, max_completion_tokens=3, stop="a", seed=-5,
                   logit_bias={"3": 2}, stop_token_ids=[4], logprobs=True, top_logprobs=2, min_tokens=2,
                   ignore_eos=True,
                   include_stop_str_in_output=True, skip_special_tokens=False, repetition_penalty=1.5).params
    assert (params.temperature, params.top_k, params.max_tokens, params.stop) == (0, 7, 3, ("a",))
    assert (params.logit_bias, params.stop_token_ids, params.logprobs, params.seed) == ({3: 2.0}, (4,), 2, -5)
    assert (params.min_tokens, params.ignore_eos, params.include_stop_str_in_output) == (2, True, True)
    assert (params.skip_special_tokens, params.repetition_penalty) == (False, 1.5)
    assert ready("chat", messages=HI, logprobs=True).params.logprobs == 0
    assert ready("completions", prompt="x", logprobs=0).params.logprobs == 0


def test_chat_prompts() -> None:
    def text(**fields: Any) -> bytes:
        return bytes(list(ready("chat", **fields).prompt_token_ids))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text(messages=parts) == b"<user>a\nb\n<assistant>"
    assert text(messages=HI, add_generation_prompt=False) == b"<user>hi\n"
    assert text(messages=HI, continue_final_message=True) == b"<user>hi"
    assert text(messages=HI, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low") == \
        b"<user>hi\n[enable_thinking=False][reasoning_effort=low]<assistant>"
