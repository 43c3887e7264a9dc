"""What a client sees of a request: its events, and the answer that they add up to."""

import msgspec

from ringserve.v1 import inference_pb2 as pb


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """The server has the request. Yielded once, however often the connection was lost."""

    request_id: str
    received_bytes: int
    committed: bool


class Estimated(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request before it runs."""

    prompt_tokens: int
    cached_tokens: int
    """Of these, computed already."""
    ring_width: int
    """Ranks that share the work."""
    kv_bytes: int
    queue_position: int
    queue_ms: int | None
    """None while nothing has been measured."""
    first_token_ms: int | None
    """Waiting included."""


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    position: int
    first_token_ms: int | None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the prefill has come."""

    total_tokens: int
    """Of the prompt as far as it is known: it grows while the prompt goes up."""
    processed_tokens: int
    cached_tokens: int
    percent: float
    """By cost: the last token of a long prompt costs more than the first."""
    elapsed_ms: int
    eta_ms: int | None
    """Until the first token; None while the prompt goes up, or while nothing has been measured."""


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    logprob: float
    token: bytes


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    logprob: float
    token: bytes
    """What the token stands for, which need not be whole characters."""
    top: tuple[TopLogprob, ...]
    """The most likely tokens, best first."""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    token_ids: tuple[int, ...]
    """Their text may come later, when its characters are complete."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each token id, when they were asked for."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    """`stop` or `length`."""
    stop: str | int | None
    """The stop string or the stop token id; None for the model's own end token."""
    usage: Usage


Event = Accepted | Estimated | Queued | Progress | Delta | Finished


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request, as a whole."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """Empty when they were not asked for."""
    finish_reason: str
    stop: str | int | None
    usage: Usage


class Model(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    max_tokens: int
    """Longest prompt and answer together."""
    ring_size: int
    server_version: str


def event_of(event: pb.Event) -> Event | None:
    """None for a kind of event that is newer than this client."""
    match event.WhichOneof("kind"):
        case "accepted":
            accepted = event.accepted
            return Accepted(request_id=accepted.request_id, received_bytes=accepted.received_bytes,
                            committed=accepted.committed)
        case "estimated":
            return estimated_of(event.estimated)
        case "queued":
            return Queued(position=event.queued.position, first_token_ms=_optional(event.queued, "first_token_ms"))
        case "prefill_progress":
            progress = event.prefill_progress
            return Progress(
                total_tokens=progress.total_tokens, processed_tokens=progress.processed_tokens,
                cached_tokens=progress.cached_tokens, percent=progress.percent, elapsed_ms=progress.elapsed_ms,
                eta_ms=_optional(progress, "eta_ms"))
        case "delta":
            delta = event.delta
            return Delta(text=delta.text, token_ids=tuple(delta.token_ids),
                         logprobs=tuple(map(_logprob_of, delta.logprobs)))
        case "finished":
            return _finished_of(event.finished)
        case _:
            return None


def estimated_of(estimated: pb.Estimated) -> Estimated:
    return Estimated(
        prompt_tokens=estimated.prompt_tokens, cached_tokens=estimated.cached_tokens,
        ring_width=estimated.ring_width, kv_bytes=estimated.kv_bytes, queue_position=estimated.queue_position,
        queue_ms=_optional(estimated, "queue_ms"), first_token_ms=_optional(estimated, "first_token_ms"))


def model_of(model: pb.Model) -> Model:
    return Model(name=model.name, max_tokens=model.max_tokens, ring_size=model.ring_size,
                 server_version=model.server_version)


def _finished_of(finished: pb.Finished) -> Finished:
    usage, stop = finished.usage, finished.WhichOneof("stop")
    return Finished(
        reason=pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        stop=getattr(finished, stop) if stop is not None else None,
        usage=Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
                    cached_tokens=usage.cached_tokens))


def _logprob_of(logprob: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=logprob.token_id, logprob=logprob.logprob, token=logprob.token,
        top=tuple(TopLogprob(token_id=top.token_id, logprob=top.logprob, token=top.token) for top in logprob.top))


def _optional(message: pb.Estimated | pb.Queued | pb.PrefillProgress, field: str) -> int | None:
    return getattr(message, field) if message.HasField(field) else None
