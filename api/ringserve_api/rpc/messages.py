"""Protobuf messages from and to what the rest of the server uses. Validation is `prepare`'s, as for HTTP."""

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from google.protobuf.duration_pb2 import Duration

from ringserve.errors import ContextLengthError, EngineError, InvalidValueError
from ringserve.outputs import Estimate, Progress, RequestOutput, TokenLogprob
from ringserve.v1 import inference_pb2 as pb
from ringserve_api.engine_port import Tokenizer
from ringserve_api.errors import ApiError
from ringserve_api.prepare import Kind, Prepared
from ringserve_api.reply import check_finish

MOST_DEADLINE_S = 7 * 24 * 3600.0

_SAMPLING = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
             "frequency_penalty", "repetition_penalty", "ignore_eos", "skip_special_tokens")
_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def new_id() -> str:
    """A name in the engine, which no client chooses."""
    return f"rpc-{uuid.uuid4().hex}"


def fields_of(kind: Kind, request: Any, **prompt: Any) -> dict[str, Any]:
    """The fields of the HTTP request that asks for the same; `prompt` or `messages` are given."""
    fields: dict[str, Any] = {"model": request.model, **prompt, "return_progress": True}
    if isinstance(request, pb.TokenizeRequest):
        return fields
    sampling, scheduling = request.sampling, request.scheduling
    for name in _SAMPLING:
        if sampling.HasField(name):
            fields[name] = getattr(sampling, name)
            if not math.isfinite(fields[name]):  # JSON has nothing to say it with
                raise InvalidValueError(f"{name} must be finite", name)
    if sampling.HasField("include_stop_string"):
        fields["include_stop_str_in_output"] = sampling.include_stop_string
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.HasField("logprobs"):
        if kind == "chat":
            fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        else:
            fields["logprobs"] = sampling.logprobs
    if scheduling.priority:
        fields["priority"] = scheduling.priority
    if scheduling.cache_salt:
        fields["cache_salt"] = scheduling.cache_salt
    return fields


def to_the_end(prepared: Prepared, sampling: pb.Sampling) -> Prepared:
    """/v1/completions ends after 16 tokens when nothing is said, which no one expects here."""
    if sampling.HasField("max_tokens"):
        return prepared
    return msgspec.structs.replace(prepared, params=msgspec.structs.replace(prepared.params, max_tokens=None))


def unknown_prompt(prepared: Prepared, tokens: int, n_ctx: int) -> Prepared:
    """For a prompt of so many tokens of which nothing is computed yet. Raises ContextLengthError."""
    output = prepared.params.max_tokens or 1
    if tokens + output > n_ctx:
        raise ContextLengthError(tokens, output, n_ctx)
    salt = uuid.uuid4().hex
    return msgspec.structs.replace(prepared, prompt_ids=bytes(4 * tokens),
                                   scheduling=msgspec.structs.replace(prepared.scheduling, cache_salt=salt))


def conversation_of(messages: Sequence[pb.ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def deadline_of(request: Any) -> float | None:
    """Raises InvalidValueError for one that has passed."""
    if isinstance(request, pb.TokenizeRequest) or not request.scheduling.HasField("deadline"):
        return None
    seconds = seconds_of(request.scheduling.deadline, "deadline", MOST_DEADLINE_S)
    if not seconds:
        raise InvalidValueError("deadline must lie in the future, got 0 s", "deadline")
    return seconds


def least(*seconds: float | None) -> float | None:
    return min((s for s in seconds if s is not None), default=None)


def seconds_of(duration: Duration, name: str, most: float) -> float:
    """Raises InvalidValueError unless it is in 0 to `most` seconds."""
    seconds = float(duration.seconds) + duration.nanos / 1e9
    if not 0 <= seconds <= most:
        raise InvalidValueError(f"{name} must be in 0 to {most:g} s, got {seconds:g} s", name)
    return seconds


def check_in_time(estimate: Estimate, deadline_s: float | None, began: float) -> None:
    """Raises ApiError when the first token is expected after the deadline of a request that began then."""
    if deadline_s is None or estimate.first_token_ms is None:
        return
    expected_s, left_s = estimate.first_token_ms / 1000, deadline_s - (time.monotonic() - began)
    if expected_s > left_s:
        raise ApiError("deadline_exceeded", f"the first token is expected in {expected_s:.1f} s, and the deadline is "
                       f"in {left_s:.1f} s")


def estimated(estimate: Estimate) -> pb.Estimated:
    return pb.Estimated(
        prompt_tokens=estimate.prompt_tokens, cached_tokens=estimate.cached_tokens, ring_width=estimate.ring_width,
        kv_bytes=estimate.kv_bytes, queue_position=estimate.queue_position, queue_ms=estimate.queue_ms,
        first_token_ms=estimate.first_token_ms)


def snapshot(progress: Progress) -> pb.Event:
    """Queued or PrefillProgress, without a number yet."""
    if progress.queue_position:
        return pb.Event(queued=pb.Queued(position=progress.queue_position, first_token_ms=progress.eta_ms))
    return pb.Event(prefill_progress=pb.PrefillProgress(
        total_tokens=progress.total, processed_tokens=progress.processed, cached_tokens=progress.cached,
        percent=progress.percent, elapsed_ms=progress.time_ms, eta_ms=progress.eta_ms))


def delta(output: RequestOutput, tokenizer: Tokenizer) -> pb.Delta:
    return pb.Delta(text=output.text, token_ids=output.token_ids, logprobs=logprobs(output.logprobs, tokenizer))


def logprobs(found: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(
        token_id=entry.token_id, logprob=entry.logprob, token=tokenizer.token_bytes(entry.token_id),
        top=[pb.TopLogprob(token_id=token, logprob=value, token=tokenizer.token_bytes(token))
             for token, value in entry.top]) for entry in found]


def finished(output: RequestOutput) -> pb.Finished:
    check_finish(output)
    assert output.finish_reason is not None
    stop, usage = output.stop_reason, output.usage
    if usage is None:
        raise EngineError("a request ended without usage")
    return pb.Finished(
        reason=_REASONS[output.finish_reason],
        stop_string=stop if isinstance(stop, str) else None, stop_token_id=stop if isinstance(stop, int) else None,
        usage=pb.Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
                       cached_tokens=usage.cached_tokens))
