"""What a request gives back, as a stream of deltas (RequestOutput) and, offline, as a whole (Completion)."""

import msgspec


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a prefill has come. `total`, `cached` and `processed` count prompt tokens."""

    total: int
    cached: int
    processed: int
    time_ms: int
    """Since the request arrived."""
    percent: float
    """Weighted by cost: the last token of a long prompt costs more than the first."""
    eta_ms: int | None
    """To the first token; None while nothing has been measured."""
    queue_position: int
    """Requests to be started before this one; 0 when running."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request before it runs."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in the cache now or being computed for another request."""
    ring_width: int
    """Ranks over which its new blocks would be dealt."""
    kv_bytes: int
    """Of the KV cache for the prompt and the reserve for its output, cached blocks included."""
    queue_ms: int | None
    """Until its prefill begins; None while nothing has been measured."""
    first_token_ms: int | None
    """Until its first token, waiting included."""
    queue_position: int
    """Requests to be started before this one."""


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens and their log-probabilities, best first, as many as were asked for."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One event of one request: progress, or new tokens, or the end (`finish_reason` is set), or both."""

    request_id: str
    text: str = ""
    """New text; whole characters only."""
    token_ids: list[int] = []
    """New tokens. Their text may come later, when it is complete."""
    logprobs: list[TokenLogprob] = []
    progress: Progress | None = None
    finish_reason: str | None = None
    """`stop` (end token or stop string) or `length`."""
    stop_reason: str | int | None = None
    """The stop string or the stop token id that ended the text; None for the model's own end token."""
    usage: Usage | None = None
    """Set with `finish_reason`."""


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop_reason: str | int | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request, in the shape of vLLM's offline result."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    usage: Usage
