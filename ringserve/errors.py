"""Every error ringserve raises on purpose. The type answers: whose fault, and is the engine alive?

RingserveError
├── StartupError              the operator's: the process prints one line and exits with code 2
│   ├── ConfigError           a flag or a combination of flags
│   └── CheckpointError       a model directory that is missing, truncated or inconsistent
│       └── UnsupportedModelError   a model that cannot work here, with the reason
├── RequestError              one client's: the engine is alive and has done no work for it
│   ├── InvalidValueError     a field with a wrong value (`param` names it)
│   ├── ContextLengthError    prompt and output do not fit
│   └── OverloadedError       the queue is full; later it may not be
└── EngineError               ours: open requests end with this error
    ├── EngineDeadError       the engine process or one of its ranks is gone
    └── RingTimeoutError      a peer did not answer within the time-out
"""


class RingserveError(Exception):
    """Base of the tree. `code` is the stable word that HTTP and gRPC clients see."""

    code = "internal_error"

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else self.code


class StartupError(RingserveError):
    code = "startup_error"


class ConfigError(StartupError):
    code = "config_error"


class CheckpointError(StartupError):
    code = "checkpoint_error"


class UnsupportedModelError(CheckpointError):
    code = "unsupported_model"


class RequestError(RingserveError):
    code = "invalid_value"
    param: str | None = None


class InvalidValueError(RequestError):
    """A field of a request has a value that cannot work; `param` is the field's name on the wire."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    code = "context_length_exceeded"

    def __init__(self, n_prompt_tokens: int, max_output_tokens: int, n_ctx: int, param: str = "prompt") -> None:
        super().__init__(
            f"this server's maximum context length is {n_ctx} tokens, but the request asks for "
            f"{n_prompt_tokens + max_output_tokens} ({n_prompt_tokens} in the prompt, "
            f"{max_output_tokens} for the output)")
        self.n_prompt_tokens = n_prompt_tokens
        self.max_output_tokens = max_output_tokens
        self.n_ctx = n_ctx
        self.param = param


class OverloadedError(RequestError):
    """`retry_after_s`: when there should be room again, where that can be told."""

    code = "server_overloaded"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(RingserveError):
    code = "engine_error"


class EngineDeadError(EngineError):
    """The engine stopped. `rank` is the rank that failed first, None when the engine itself did."""

    code = "engine_dead"

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RingTimeoutError(EngineError):
    """`peer` is the rank that did not answer, where it is known."""

    code = "ring_timeout"

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


def error_named(kind: str, base: type[RingserveError] = RingserveError) -> type[RingserveError] | None:
    """The class of that name in the tree below `base`: errors cross processes by name."""
    if base.__name__ == kind:
        return base
    return next((found for below in base.__subclasses__() if (found := error_named(kind, below))), None)
