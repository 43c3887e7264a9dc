"""What this package needs of the engine and its tokenizer, and nothing else of them.

The real ones are `ringserve.async_engine.AsyncEngine` and `ringserve.tokenizer.Tokenizer`; tests bring fakes.
"""

import importlib
import operator
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ringserve.errors import EngineDeadError
from ringserve.outputs import Estimate, RequestOutput
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams


class EngineInfo(Protocol):
    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def ring_size(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def prefix_cache(self) -> bool: ...
    @property
    def default_sampling(self) -> Mapping[str, Any]: ...


class OutputStream(Protocol):
    """What comes of a request that was queued."""

    @property
    def estimate(self) -> Estimate | None:
        """What was known of it then."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...
    async def __anext__(self) -> RequestOutput: ...


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...
    @property
    def dead(self) -> EngineDeadError | None: ...

    async def submit(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams, *,
                     request_id: str, return_progress: bool = False,
                     scheduling: SchedulingParams = ...) -> OutputStream:
        """Returns when the request is queued; raises RequestError or EngineDeadError before any work.

        Who cancels the awaiting task need not `cancel` the request: submit itself does."""

    async def estimate(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams,
                       scheduling: SchedulingParams = ...) -> Estimate:
        """What would become of a request now. Raises what `submit` would raise; queues nothing."""

    async def cancel(self, request_id: str) -> None: ...
    async def close(self) -> None: ...
    async def died(self) -> EngineDeadError: ...


class Tokenizer(Protocol):
    """`source` and the class's `from_source(source)` let the prompt worker make the same tokenizer."""

    @property
    def source(self) -> str: ...

    def encode(self, text: str, allow_special: bool, *, tenant: str) -> "array[int]": ...
    def encode_part(self, text: str, *, final: bool, tenant: str) -> "tuple[array[int], int]": ...
    def encode_at_once(self, text: str) -> "array[int]": ...
    @property
    def around(self) -> "tuple[array[int], array[int]]": ...
    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool,
                    continue_final_message: bool, chat_template_kwargs: dict[str, Any],
                    tenant: str) -> "array[int]": ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The EngineInfo of the model under the name that clients use; crosses to the prompt worker."""

    model_name: str
    max_model_len: int
    vocab_size: int
    ring_size: int
    version: str
    prefix_cache: bool
    default_sampling: dict[str, Any]

    @classmethod
    def of(cls, info: EngineInfo, name: str | None) -> "ServedModel":
        return cls(model_name=name or info.model_name, max_model_len=info.max_model_len,
                   vocab_size=info.vocab_size, ring_size=info.ring_size, version=info.version,
                   prefix_cache=info.prefix_cache, default_sampling=dict(info.default_sampling))

    @property
    def fingerprint(self) -> str:
        """Version and ring size: what changes the numerics."""
        return f"ringserve-{self.version}-r{self.ring_size}"


class TokenizerRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """How another process makes the same tokenizer: a class by name, and what to load."""

    module: str
    qualname: str
    source: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenizerRecipe":
        kind = type(tokenizer)
        return cls(module=kind.__module__, qualname=kind.__qualname__, source=tokenizer.source)

    def load(self) -> Tokenizer:
        kind = operator.attrgetter(self.qualname)(importlib.import_module(self.module))
        tokenizer: Tokenizer = kind.from_source(self.source)
        return tokenizer
