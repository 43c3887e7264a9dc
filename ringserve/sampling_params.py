"""SamplingParams: how one request wants its tokens chosen. Crosses processes as msgpack, so it is a Struct."""

import math
import re

import msgspec

from ringserve.errors import InvalidValueError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters in vLLM's names and defaults.

    Raises InvalidValueError, naming the field, when a value cannot work.
    """

    max_tokens: int | None = 16
    """Most tokens to generate; None fills the context."""
    min_tokens: int = 0
    """No end token and no stop string before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one."""
    seed: int | None = None
    """The same seed gives the same noise at the same position; None draws one when the request arrives."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Return the log-probability of each token and of this many alternatives (0 to 20)."""
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # as in vLLM
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        self._check_types()
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
                     "repetition_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidValueError(f"{name} must be a finite number, got {getattr(self, name)}", name)
        self._check("max_tokens", self.max_tokens is None or 1 <= self.max_tokens < 2**31, "at least 1")
        self._check("min_tokens", 0 <= self.min_tokens < 2**31, "at least 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", "min_tokens")
        self._check("temperature", 0 <= self.temperature <= 100, "between 0 and 100")
        self._check("top_k", -1 <= self.top_k < 2**31, "-1 or 0 (off) or positive")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        self._check("repetition_penalty", 0 < self.repetition_penalty <= 100, "in (0, 100]")
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                    f"between 0 and {MAX_LOGPROBS}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(0 < len(s) <= MAX_STOP_LENGTH for s in self.stop):
            raise InvalidValueError(f"stop must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} "
                                    f"characters, got lengths {[len(s) for s in self.stop[:MAX_STOP_STRINGS + 1]]}",
                                    "stop")
        self._check("stop_token_ids", all(0 <= t < 2**31 for t in self.stop_token_ids), "token ids")
        self._check("logit_bias", all(
            0 <= token < 2**31 and math.isfinite(bias) and -100 <= bias <= 100
            for token, bias in self.logit_bias.items()), "token ids with biases in [-100, 100]")

    def _check_types(self) -> None:
        """A Struct checks types when it is decoded, not when it is made: what is wrong must not get that far."""
        try:
            msgspec.convert(msgspec.structs.asdict(self), _Types, strict=True)
        except msgspec.ValidationError as error:
            what = str(error).partition(" - at ")[0]
            name = match[1] if (match := re.search(r"\$\.(\w+)", str(error))) else None
            raise InvalidValueError(f"{name or 'a sampling parameter'}: {what[:1].lower()}{what[1:]}", name) from None

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise InvalidValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}"[:300], name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_Types = msgspec.defstruct("_Types", [(field.name, field.type) for field in msgspec.structs.fields(SamplingParams)])
"""The fields' types alone, without the checks of values."""
