"""What crosses between a client process and the engine process: commands in, updates out."""

import msgspec

from ringserve.config import EngineConfig
from ringserve.outputs import Estimate, Progress, TokenLogprob, Usage
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first command."""

    config: EngineConfig
    checkpoint: str
    """Directory of the model."""


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    token_ids: bytes
    """Little-endian u32."""
    params: SamplingParams
    end_token_ids: tuple[int, ...]
    scheduling: SchedulingParams = SchedulingParams()
    return_progress: bool = False


class AskEstimate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What would become of this request? Answered by Admission; nothing is queued."""

    request: AddRequest


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    request_id: str
    satisfied: bool = False
    """Its client has all it wanted: a stop string came."""


Command = EngineSetup | AddRequest | AskEstimate | CancelRequest


class RequestUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What one step gave one request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    progress: Progress | None = None
    finish_reason: str | None = None
    """`stop`, `length`, or `error` (see `error`)."""
    stop_token_id: int | None = None
    usage: Usage | None = None
    cached_tokens: int = 0
    """Of the prompt; told with the first token."""
    error: str | None = None


class Admission(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to AddRequest and to AskEstimate, before any work is done."""

    request_id: str
    estimate: Estimate | None = None
    """None when the request was refused."""
    refusal: str | None = None
    """Why it was refused: the message of the error of class `kind`."""
    kind: str = ""
    param: str | None = None
    retry_after_s: float | None = None


class Updates(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All updates of one step, in one message."""

    updates: list[RequestUpdate]


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Loaded, warmed up, waiting for requests."""

    ring_size: int
    max_model_len: int
    """Longest prompt plus output: the model's limit and the cache's."""
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    dtype: str
    decisions: list[str]
    """What was decided at start and why, a line each."""
    pids: list[int]
    """Of the ranks."""


class StartupFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`kind` is the name of a StartupError class, or EngineDeadError."""

    kind: str
    message: str
    rank: int | None = None


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last message of an engine that cannot go on."""

    message: str
    rank: int | None = None


Report = EngineReady | StartupFailed | Admission | Updates | EngineFailed
