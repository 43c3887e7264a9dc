"""Reply: the envelope of an answer, the same for every route; a Shape fills in the choice.

id, created, model, fingerprint, service tier, usage, and in streams the sequence number and the progress.
"""

import math
import time
from typing import Any, Protocol

from ringserve.errors import EngineError
from ringserve.outputs import Progress, RequestOutput, TokenLogprob, Usage
from ringserve_api.engine_port import ServedModel
from ringserve_api.prepare import Prepared

Json = dict[str, Any]
VERY_UNLIKELY = -9999.0


class Answer:
    """All events of one request, put together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        self._texts.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs)
        self.last = output

    @property
    def text(self) -> str:
        return "".join(self._texts)


class Shape(Protocol):
    """How one route writes a choice."""

    object_name: str
    chunk_object_name: str

    def opening(self) -> tuple[Json, Json]:
        """The choice of the first chunk, and what that chunk carries beside it."""

    def delta(self, output: RequestOutput) -> Json:
        """The choice of a chunk with new text."""

    def whole(self, answer: Answer) -> tuple[Json, Json]:
        """The choice of an answer that is not streamed, and what the answer carries beside it."""


class Reply:
    def __init__(self, shape: Shape, prepared: Prepared, model: ServedModel, request_id: str) -> None:
        self._shape = shape
        self._prepared = prepared
        self._envelope = {"id": request_id, "object": shape.chunk_object_name, "created": int(time.time()),
                          "model": model.model_name, "system_fingerprint": model.fingerprint}
        if prepared.service_tier is not None:
            self._envelope["service_tier"] = prepared.service_tier
        self._sequence_number = 0

    def opening(self) -> Json:
        """The chunk that is sent at once, before there is a token."""
        choice, beside = self._shape.opening()
        return self._chunk([choice], beside)

    def chunks(self, output: RequestOutput) -> list[Json]:
        """The chunks that one event becomes."""
        chunks = []
        if output.progress is not None and self._prepared.return_progress:
            chunks.append(self._chunk([], {"prompt_progress": progress_json(output.progress)}))
        shown = output.text or output.logprobs or output.finish_reason or (
            output.token_ids and self._prepared.return_token_ids)
        if shown:
            check_finish(output)
            chunks.append(self._chunk([self._shape.delta(output)], {}))
        if output.finish_reason is not None and self._prepared.include_usage:
            chunks.append(self._chunk([], {"usage": usage_json(output.usage)}))
        return chunks

    def whole(self, answer: Answer) -> Json:
        assert answer.last is not None
        check_finish(answer.last)
        choice, beside = self._shape.whole(answer)
        return {**self._envelope, "object": self._shape.object_name, "choices": [choice],
                "usage": usage_json(answer.last.usage), **beside}

    def _chunk(self, choices: list[Json], beside: Json) -> Json:
        chunk: Json = {**self._envelope, "choices": choices, "sequence_number": self._sequence_number}
        self._sequence_number += 1
        if self._prepared.include_usage:
            chunk["usage"] = None
        return {**chunk, **beside}


def check_finish(output: RequestOutput) -> None:
    """Clients take a finish reason they do not know for success, so an unknown one is an error."""
    if output.finish_reason not in (None, "stop", "length"):
        raise EngineError("a request ended with an unknown finish reason")


def usage_json(usage: Usage | None) -> Json:
    if usage is None:
        raise EngineError("a request ended without usage")
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}


def progress_json(progress: Progress) -> Json:
    """llama.cpp's names, and ours for what it does not tell."""
    return {"total": progress.total, "cache": progress.cached, "processed": progress.processed,
            "time_ms": progress.time_ms, "percent": round(finite(progress.percent), 3),
            "eta_ms": progress.eta_ms, "queue_position": progress.queue_position}


def finite(value: float) -> float:
    """JSON has no NaN and no infinity; a log-probability of -inf is one that is very unlikely."""
    return max(value, VERY_UNLIKELY) if math.isfinite(value) else VERY_UNLIKELY
