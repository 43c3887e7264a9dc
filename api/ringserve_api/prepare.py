"""From the bytes of a request to sampling parameters and token ids: a pure function.

It runs inline for small bodies and in the prompt worker for large ones, hence its result is a Struct of plain
values. Every error it raises is a RingserveError with a text made here.
"""

import sys
from array import array
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec
from pydantic import ValidationError

from ringserve.errors import InvalidValueError
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams
from ringserve_api.engine_port import EngineInfo, Tokenizer
from ringserve_api.errors import ApiError
from ringserve_api.fields import (
    UNSUPPORTED,
    UNSUPPORTED_STREAM_OPTIONS,
    ChatFields,
    CompletionFields,
    GenerationFields,
    is_neutral,
)
from ringserve_api.messages import read_messages

Kind = Literal["completions", "chat"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_NESTING = 64
MAX_ERRORS = 10
MAX_ERROR_LENGTH = 200
MAX_STOP = 4
MAX_LOGIT_BIAS = 1024
DEFAULT_COMPLETION_TOKENS = 16
TEMPLATE_KWARGS = frozenset({
    "enable_thinking", "thinking", "reasoning_effort", "thinking_budget", "preserve_thinking", "date_string",
})
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may set for requests that leave it out."""
_PRIORITY_OF_TIER = {"priority": -2, "flex": 3}
"""A service tier is a priority under OpenAI's name for it; the other tiers say nothing."""
_PASSED_ON = ("min_tokens", "seed", "presence_penalty", "frequency_penalty", "include_stop_str_in_output",
              "ignore_eos", "skip_special_tokens")


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One request, ready for the engine."""

    kind: Kind
    params: SamplingParams
    scheduling: SchedulingParams
    service_tier: str | None
    """The tier that serves the request, where one was asked for."""
    prompt_ids: bytes
    """The prompt's token ids as little-endian u32."""
    stream: bool
    include_usage: bool
    return_progress: bool
    return_token_ids: bool
    echo: str | None
    """Text that the answer starts with."""
    ignored: list[str]
    """Fields of the request that had no effect."""

    @property
    def prompt_token_ids(self) -> "array[int]":
        return from_little_endian(self.prompt_ids)


def little_endian(ids: "array[int]") -> bytes:
    """u32 ids as they travel."""
    if sys.byteorder == "big":
        ids = array("I", ids)
        ids.byteswap()
    return ids.tobytes()


def from_little_endian(data: bytes) -> "array[int]":
    ids = array("I", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def prepare(kind: Kind | None, body: bytes, tokenizer: Tokenizer, info: EngineInfo, tenant: str = "") -> Prepared:
    """Parse, validate and tokenize the body of a tenant's request; without a `kind` of whichever kind it is.

    Raises InvalidValueError or ApiError with the field's name.
    """
    raw = parse_json(body)
    _check_model(raw.get("model"), info.model_name)
    kind = kind or _kind_of(raw)
    _check_supported(raw, UNSUPPORTED[kind], "")
    fields = _validate(CompletionFields if kind == "completions" else ChatFields, raw)
    ignored = set(fields.model_extra or {}) - UNSUPPORTED[kind].keys()
    if fields.stream_options is not None:
        if not fields.stream:
            raise InvalidValueError("stream_options needs stream to be true", "stream_options")
        extra = fields.stream_options.model_extra or {}
        _check_supported(extra, UNSUPPORTED_STREAM_OPTIONS, "stream_options.")
        ignored |= {f"stream_options.{name}" for name in extra.keys() - UNSUPPORTED_STREAM_OPTIONS.keys()}
    params = _sampling_params(fields, info)
    scheduling = _scheduling_params(fields, tenant)
    echo = None
    if isinstance(fields, ChatFields):
        ids = _chat_ids(fields, tokenizer, tenant, ignored)
    else:
        assert isinstance(fields, CompletionFields)
        ids, echo = _completion_ids(fields, tokenizer, tenant)
    return Prepared(
        kind=kind, params=params, scheduling=scheduling,
        service_tier="default" if fields.service_tier == "auto" else fields.service_tier,
        prompt_ids=little_endian(ids), stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
        return_progress=bool(fields.return_progress), return_token_ids=bool(fields.return_token_ids),
        echo=echo, ignored=sorted(ignored))


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse an object of at most MAX_NESTING levels.

    msgspec's parser refuses NaN, Infinity, numbers out of range, invalid UTF-8 and lone surrogates.
    """
    if not body:
        raise ApiError("invalid_json", "the body is empty: send a JSON object")
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError("invalid_json", f"the body is not UTF-8: {error.reason}") from None
    except RecursionError:
        raise ApiError("invalid_json", f"the body nests deeper than {MAX_NESTING} levels") from None
    except msgspec.DecodeError as error:
        # The parser says "truncated" too where the second half of a surrogate pair is missing.
        text = str(error).replace("Input data was truncated", "it ends early, or holds half a surrogate pair")
        raise ApiError("invalid_json", f"the body is not valid JSON: {text}"[:MAX_ERROR_LENGTH]) from None
    if type(value) is not dict:
        raise ApiError("invalid_json", "the body must be a JSON object")
    _check_nesting(value)
    return value


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list]
        if not level:
            return
    raise ApiError("invalid_json", f"the body nests deeper than {MAX_NESTING} levels")


def _check_model(model: Any, served: str) -> None:
    if model is None:
        raise InvalidValueError("model is required", "model")
    if not isinstance(model, str):
        raise InvalidValueError("model must be a string", "model")
    if model != served:
        raise model_not_found(model, served)


def model_not_found(model: str, served: str) -> ApiError:
    return ApiError("model_not_found",
                    f"the model {model[:100]!r} does not exist; this server has {served!r}", "model")


def _kind_of(raw: Mapping[str, Any]) -> Kind:
    """Of a body that came without a route of its own: the field with the input tells."""
    chat, completion = (raw.get(name) is not None for name in ("messages", "prompt"))
    if chat == completion:
        raise InvalidValueError(
            "give either messages, as for /v1/chat/completions, or prompt, as for /v1/completions: the body has "
            + ("both" if chat else "neither"), "prompt")
    return "chat" if chat else "completions"


def _check_supported(raw: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]],
                     prefix: str) -> None:
    for name in unsupported.keys() & raw.keys():
        if not is_neutral(raw[name], unsupported[name]):
            allowed = " or ".join(msgspec.json.encode(value).decode() for value in unsupported[name])
            raise ApiError("unsupported_parameter", f"{prefix}{name} is not supported yet"
                           + (f", except as {allowed}" if allowed else ""), f"{prefix}{name}")


def _validate(model: type[GenerationFields], raw: dict[str, Any]) -> GenerationFields:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    names = [".".join(str(part) for part in item["loc"]) for item in found[:MAX_ERRORS]]
    lines = [f"{name}: {item['msg']}"[:MAX_ERROR_LENGTH] for name, item in zip(names, found)]
    if len(found) > MAX_ERRORS:
        lines.append(f"and {len(found) - MAX_ERRORS} more")
    raise InvalidValueError("; ".join(lines), names[0][:MAX_ERROR_LENGTH])


def _sampling_params(fields: GenerationFields, info: EngineInfo) -> SamplingParams:
    given = {name: getattr(fields, name) for name in _DEFAULTED + _PASSED_ON}
    defaults = {name: info.default_sampling.get(name) for name in _DEFAULTED}
    values: dict[str, Any] = defaults | {name: value for name, value in given.items() if value is not None}
    return SamplingParams(
        max_tokens=_max_tokens(fields), logprobs=_logprobs(fields), stop=_stop(fields.stop),
        stop_token_ids=tuple(_in_vocabulary(fields.stop_token_ids or [], "stop_token_ids", info)),
        logit_bias=_logit_bias(fields.logit_bias or {}, info),
        **{name: value for name, value in values.items() if value is not None})


def _scheduling_params(fields: GenerationFields, tenant: str) -> SchedulingParams:
    tier = _PRIORITY_OF_TIER.get(fields.service_tier or "auto")
    if tier is not None and fields.priority is not None:
        raise InvalidValueError(f"service_tier {fields.service_tier} is a priority ({tier}): leave out priority, "
                                "or give it with service_tier auto or default", "priority")
    return SchedulingParams(tenant=tenant, priority=tier or fields.priority or 0, cache_salt=fields.cache_salt or "")


def _max_tokens(fields: GenerationFields) -> int | None:
    given = {value for value in (fields.max_tokens, fields.max_completion_tokens) if value is not None}
    if len(given) > 1:
        raise InvalidValueError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    if given:
        return given.pop()
    return DEFAULT_COMPLETION_TOKENS if isinstance(fields, CompletionFields) else None


def _logprobs(fields: GenerationFields) -> int | None:
    if isinstance(fields, CompletionFields):
        return fields.logprobs
    assert isinstance(fields, ChatFields)
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise InvalidValueError("top_logprobs needs logprobs to be true", "top_logprobs")
    return None


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if type(value) is not list or len(value) > MAX_STOP or not all(isinstance(item, str) for item in value):
        raise InvalidValueError(f"stop must be a string or a list of at most {MAX_STOP} strings", "stop")
    return tuple(value)


def _logit_bias(given: dict[str, Any], info: EngineInfo) -> dict[int, float]:
    if len(given) > MAX_LOGIT_BIAS:
        raise InvalidValueError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, got {len(given)}",
                                "logit_bias")
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidValueError("logit_bias must have token ids as keys", "logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InvalidValueError("logit_bias must have numbers in [-100, 100] as values", "logit_bias")
        biases[int(key)] = float(bias)
    _in_vocabulary(list(biases), "logit_bias", info)
    return biases


def _in_vocabulary(ids: list[int], param: str, info: EngineInfo) -> list[int]:
    for token_id in ids:
        if token_id >= info.vocab_size:
            raise InvalidValueError(f"{param}: token id {token_id} is outside of the vocabulary of "
                                    f"{info.vocab_size} tokens", param)
    return ids


def _completion_ids(fields: CompletionFields, tokenizer: Tokenizer,
                    tenant: str) -> "tuple[array[int], str | None]":
    """The prompt's ids, which the engine checks against the vocabulary, and its text if `echo` wants it."""
    if fields.echo and fields.logprobs is not None:
        raise ApiError("unsupported_parameter", "logprobs together with echo is not supported yet",
                       "logprobs")
    prompt = _one_prompt(fields.prompt)
    if isinstance(prompt, str):
        # The client composed the whole prompt, so special tokens in it are meant.
        return tokenizer.encode(prompt, allow_special=True, tenant=tenant), prompt if fields.echo else None
    try:
        ids = array("I", prompt)
    except OverflowError:
        wrong = next(i for i in prompt if not 0 <= i < 2**32)
        raise InvalidValueError(f"prompt has {wrong} as a token id", "prompt") from None
    if not fields.echo:
        return ids, None
    return ids, b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode("utf-8", "replace")


def _one_prompt(prompt: Any) -> str | list[int]:
    """OpenAI's four forms: a string, a list of ids, and a list of one of these."""
    if isinstance(prompt, str) and prompt:
        return prompt
    if type(prompt) is list and prompt:
        types = set(map(type, prompt))
        if types == {int}:
            return prompt
        if types <= {str, list}:
            if len(prompt) > 1:
                raise ApiError("unsupported_parameter", f"prompt has {len(prompt)} prompts; only one is "
                               "supported yet, send one request each", "prompt")
            if prompt[0] and (types == {str} or set(map(type, prompt[0])) == {int}):
                only: str | list[int] = prompt[0]
                return only
    raise InvalidValueError("prompt must be a string or a list of token ids (integers), and not empty", "prompt")


def _chat_ids(fields: ChatFields, tokenizer: Tokenizer, tenant: str, ignored: set[str]) -> "array[int]":
    messages = read_messages(fields.messages, ignored)
    kwargs = _template_kwargs(fields)
    continue_final_message = bool(fields.continue_final_message)
    if continue_final_message and fields.add_generation_prompt:
        raise InvalidValueError("continue_final_message and add_generation_prompt exclude each other",
                                "continue_final_message")
    add_generation_prompt = (not continue_final_message if fields.add_generation_prompt is None
                             else fields.add_generation_prompt)
    return tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt,
                                 continue_final_message=continue_final_message, chat_template_kwargs=kwargs,
                                 tenant=tenant)


def _template_kwargs(fields: ChatFields) -> dict[str, Any]:
    """Values for the chat template from an allow-list: plain, short ones."""
    kwargs = dict(fields.chat_template_kwargs or {})
    for name, value in kwargs.items():
        if name not in TEMPLATE_KWARGS:
            raise InvalidValueError(f"chat_template_kwargs may only set {', '.join(sorted(TEMPLATE_KWARGS))}",
                                    "chat_template_kwargs")
        if not (type(value) in (bool, int, float) or (isinstance(value, str) and len(value) <= 256)):
            raise InvalidValueError("chat_template_kwargs must have booleans, numbers or short strings as "
                                    "values", "chat_template_kwargs")
    if fields.reasoning_effort is not None:
        if len(fields.reasoning_effort) > 32:
            raise InvalidValueError("reasoning_effort must be a word like low, medium or high",
                                    "reasoning_effort")
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
    return kwargs
