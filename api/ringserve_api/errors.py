"""Errors on the wire: one table from code to HTTP and gRPC, one function from any exception to a WireError.

Every route, streamed or not, turns an exception into JSON here and nowhere else. The text of an exception
that is not ours never leaves the process.
"""

import math
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ringserve.errors import ContextLengthError, OverloadedError, RequestError, RingserveError, StartupError

MAX_MESSAGE_LENGTH = 3000
MAX_RETRY_AFTER_S = 120
"""Clients take a longer Retry-After for `do not retry`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one code looks to HTTP and gRPC clients."""

    status: int
    type: str
    grpc: str
    retry: bool | None = None
    """What `x-should-retry` says; None leaves it to the client (openai retries 408, 409, 429 and 5xx)."""
    message: str | None = None
    """Replaces the exception's own text, where that is the operator's business."""
    close: bool = False
    """Close the connection: the rest of the request may never come."""
    challenge: bool = False
    """Say how to authenticate, as a 401 must (RFC 9110, 15.5.2)."""


def _client(status: int, grpc: str, error_type: str = "invalid_request_error") -> Row:
    return Row(status=status, type=error_type, grpc=grpc, retry=False)


def _unavailable(message: str | None = None) -> Row:
    return Row(status=503, type="service_unavailable_error", grpc="UNAVAILABLE", message=message)


def _server(message: str) -> Row:
    return Row(status=500, type="server_error", grpc="INTERNAL", message=message)


TABLE: dict[str, Row] = {
    "invalid_value": _client(400, "INVALID_ARGUMENT"),
    "invalid_json": _client(400, "INVALID_ARGUMENT"),
    "unsupported_parameter": _client(400, "INVALID_ARGUMENT"),
    "invalid_json_schema": _client(400, "INVALID_ARGUMENT"),
    "context_length_exceeded": _client(400, "INVALID_ARGUMENT"),
    "estimated_time_exceeds_client_timeout": _client(400, "FAILED_PRECONDITION"),
    "checksum_mismatch": _client(400, "DATA_LOSS"),
    "invalid_api_key": Row(status=401, type="authentication_error", grpc="UNAUTHENTICATED", retry=False,
                           challenge=True),
    "model_not_allowed": _client(403, "PERMISSION_DENIED", "permission_error"),
    "not_found": _client(404, "NOT_FOUND"),
    "model_not_found": _client(404, "NOT_FOUND"),
    "method_not_allowed": _client(405, "UNIMPLEMENTED"),
    "body_idle_timeout": Row(status=408, type="timeout_error", grpc="DEADLINE_EXCEEDED",
                             close=True),
    "idempotency_conflict": _client(409, "ABORTED", "conflict_error"),
    "cancelled": _client(409, "CANCELLED", "conflict_error"),
    "request_too_large": _client(413, "RESOURCE_EXHAUSTED"),
    "unsupported_media_type": _client(415, "INVALID_ARGUMENT"),
    "rate_limit_exceeded": Row(status=429, type="rate_limit_error", grpc="RESOURCE_EXHAUSTED"),
    "concurrency_limit_exceeded": Row(status=429, type="rate_limit_error", grpc="RESOURCE_EXHAUSTED"),
    "internal_error": _server("the server failed on this request"),
    "engine_error": _server("the engine failed on this request"),
    "prompt_worker_failed": _server("the process that prepares large prompts failed on this request"),
    "server_overloaded": _unavailable(),
    "draining": _unavailable(),
    "ring_degraded": _unavailable(),
    "model_loading": _unavailable(),
    "ring_timeout": _unavailable("a rank of the engine did not answer in time"),
    "engine_dead": _unavailable("the engine has stopped and the server is shutting down"),
    "deadline_exceeded": _client(504, "DEADLINE_EXCEEDED", "timeout_error"),
}

_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}


class ListenError(StartupError):
    """The server cannot listen on its address."""

    code = "listen_error"


class ClientDisconnected(Exception):
    """The client has gone; nobody reads the answer."""


class ApiError(RingserveError):
    """An error that arises in this package. `code` is a row of the table."""

    def __init__(self, code: str, message: str, param: str | None = None, *,
                 retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """An error as clients see it. Also crosses from the prompt worker, hence a Struct."""

    code: str
    message: str
    param: str | None = None
    details: dict[str, int] = {}
    headers: dict[str, str] = {}

    @property
    def row(self) -> Row:
        return TABLE[self.code]

    @property
    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.row.type, "param": self.param,
                          "code": self.code, **self.details}}


class PreparationError(RingserveError):
    """A request that the prompt worker refused, with the error it described there."""

    def __init__(self, wire: WireError) -> None:
        super().__init__(wire.message)
        self.wire = wire


def wire_error(error: BaseException) -> WireError:
    """Describe any exception to a client; what is unknown becomes `internal_error` without details."""
    if isinstance(error, PreparationError):
        return error.wire
    headers: dict[str, str] = {}
    details: dict[str, int] = {}
    param: str | None = None
    code, message = "internal_error", ""
    if isinstance(error, HTTPException) and error.status_code in _CODE_OF_STATUS:
        code = _CODE_OF_STATUS[error.status_code]
        message = "there is no such route" if code == "not_found" else "this route has no such method"
        headers.update(error.headers or {})
    elif isinstance(error, RingserveError) and error.code in TABLE:
        code, message = error.code, error.message
        if isinstance(error, RequestError | ApiError):
            param = error.param
        if isinstance(error, ContextLengthError):
            details = {"n_prompt_tokens": error.n_prompt_tokens, "n_ctx": error.n_ctx,
                       "max_output_tokens": error.max_output_tokens}
        if isinstance(error, OverloadedError | ApiError) and error.retry_after_s is not None:
            # In whole seconds. A wait that is not a number is the shortest: max() keeps its first argument then.
            headers["retry-after"] = str(math.ceil(min(MAX_RETRY_AFTER_S, max(1, error.retry_after_s))))
    row = TABLE[code]
    if row.retry is not None:
        headers["x-should-retry"] = str(row.retry).lower()
    if row.close:
        headers["connection"] = "close"
    if row.challenge:
        headers["www-authenticate"] = "Bearer"
    return WireError(code=code, message=(row.message or message)[:MAX_MESSAGE_LENGTH], param=param,
                     details=details, headers=headers)


def is_expected(error: BaseException) -> bool:
    """Whether ringserve raises `error` on purpose; anything else deserves a traceback in the log."""
    return isinstance(error, RingserveError | HTTPException)


def error_response(error: BaseException) -> Response:
    wire = wire_error(error)
    return Response(msgspec.json.encode(wire.body), wire.row.status, wire.headers, "application/json")
