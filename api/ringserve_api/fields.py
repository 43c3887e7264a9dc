"""The request fields of /v1/completions and /v1/chat/completions: what is accepted, refused and passed over.

Strict: no "1" for 1, a bool is no number, floats are finite, integers bounded. Fields whose items could make
unbounded error lists (prompt, messages, stop, logit_bias) are only roughly typed here and read in `prepare`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ringserve.sampling_params import MAX_LOGPROBS
from ringserve.scheduling_params import MAX_NAME, MAX_PRIORITY

MAX_MESSAGES = 16_384
MAX_STOP_TOKEN_IDS = 256

_INT31 = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=_INT31)]
Positive = Annotated[int, Field(ge=1, le=_INT31)]
ServiceTier = Literal["auto", "default", "priority", "flex"]
TokenIds = Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]


class Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Fields):
    include_usage: bool | None = None


class GenerationFields(Fields):
    """What both routes share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Any] | None = None
    stop: Any = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_progress: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    service_tier: ServiceTier | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionFields(GenerationFields):
    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class ChatFields(GenerationFields):
    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


_ANY = object()
_COMMON: dict[str, tuple[object, ...]] = {
    "n": (1,), "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1.0, 1),
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "allowed_token_ids": (), "bad_words": ([],),
    "logits_processors": ([],), "prompt_logprobs": (), "prompt_embeds": (), "truncate_prompt_tokens": (),
    "store": (False,), "moderation": (), "prompt_cache_options": (), "spaces_between_special_tokens": (True,),
}

UNSUPPORTED: dict[str, dict[str, tuple[object, ...]]] = {
    "completions": {
        **_COMMON, "suffix": ("",), "add_special_tokens": (True,), "tools": ([],), "messages": (),
    },
    "chat": {
        **_COMMON, "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (_ANY,),
        "functions": ([],), "function_call": ("none", "auto"), "audio": (), "modalities": (["text"],),
        "prediction": (), "verbosity": ("medium",), "web_search_options": (), "echo": (False,), "prompt": (),
        "chat_template": (), "documents": ([],), "add_special_tokens": (False,), "mm_processor_kwargs": ({},),
    },
}
"""Known fields that do not work yet, with the values that ask for nothing; null always asks for nothing."""

UNSUPPORTED_STREAM_OPTIONS: dict[str, tuple[object, ...]] = {"continuous_usage_stats": (False,)}


def is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether a field that does not work may have `value`, because it asks for nothing."""
    if value is None or _ANY in neutral:
        return True
    # By type too: True == 1.
    return any(type(value) is type(other) and value == other for other in neutral)
