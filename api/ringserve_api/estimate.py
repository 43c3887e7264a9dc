"""EstimateResponse: what would become of a request, told without queueing it.

Takes the body of /v1/completions or /v1/chat/completions. Asking is no error: that a prompt is too long, or the
server too busy, is an answer. A body that its route would refuse is refused here too.
"""

import math

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringserve.errors import ContextLengthError, OverloadedError
from ringserve_api.generate import ignored_header, read_request
from ringserve_api.generation import refusals_named_for, unless_ended
from ringserve_api.prepare import Prepared
from ringserve_api.reply import Json
from ringserve_api.state import ServerState


class EstimateResponse(Response):
    def __init__(self, state: ServerState) -> None:
        super().__init__()
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        with state.open_request() as stopped:
            prepared = await read_request(state, None, Request(scope, receive), stopped)
            answer = await unless_ended(receive, stopped, estimate_json(state, prepared))
            response = Response(msgspec.json.encode(answer), 200, ignored_header(prepared.ignored),
                                "application/json")
            await response(scope, receive, send)


async def estimate_json(state: ServerState, prepared: Prepared) -> Json:
    """The answer to one estimate; what is not known of a request that does not fit is null."""
    prompt_token_ids, n_ctx = prepared.prompt_token_ids, state.model.max_model_len
    answer: Json = {
        "object": "estimate", "model": state.model.model_name, "fits": True, "prompt_tokens": len(prompt_token_ids),
        "cached_tokens": None, "max_output_tokens": prepared.params.max_tokens or max(0, n_ctx - len(prompt_token_ids)),
        "n_ctx": n_ctx, "ring_width": None, "kv_bytes": None, "queue_position": None, "queue_ms": None,
        "time_to_first_token_ms": None}
    try:
        with refusals_named_for(prepared.kind):
            estimate = await state.engine.estimate(prompt_token_ids, prepared.params, prepared.scheduling)
    except ContextLengthError as error:
        return answer | {"fits": False, "max_output_tokens": error.max_output_tokens,
                         "reason": {"code": error.code, "message": error.message}}
    except OverloadedError as error:
        return answer | {"fits": False, "reason": {"code": error.code, "message": error.message,
                                                   "retry_after_ms": milliseconds(error.retry_after_s)}}
    return answer | {
        "prompt_tokens": estimate.prompt_tokens, "cached_tokens": estimate.cached_tokens,
        "ring_width": estimate.ring_width, "kv_bytes": estimate.kv_bytes,
        "queue_position": estimate.queue_position, "queue_ms": estimate.queue_ms,
        "time_to_first_token_ms": estimate.first_token_ms}


def milliseconds(seconds: float | None) -> int | None:
    """Whole ones, rounded up; None for a time that is not known."""
    return math.ceil(max(0.0, seconds) * 1000) if seconds is not None and math.isfinite(seconds) else None
