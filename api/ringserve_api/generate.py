"""GenerateResponse: a request for text from its first body byte to the last byte of its answer.

It is one response object, and not a handler that makes one, so that a single block spans the whole life of
the request: what was opened is left whatever happens.
"""

import re
import uuid

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringserve.errors import InvalidValueError
from ringserve.scheduling_params import MAX_NAME
from ringserve_api.chat import ChatShape
from ringserve_api.completions import CompletionShape
from ringserve_api.engine_port import Tokenizer
from ringserve_api.generation import Generation, Stopped, unless_ended
from ringserve_api.keys import Key
from ringserve_api.prepare import Kind, Prepared, prepare
from ringserve_api.reply import Answer, Reply, Shape
from ringserve_api.sse import EventStream
from ringserve_api.state import ServerState

_ID_PREFIX: dict[Kind, str] = {"completions": "cmpl", "chat": "chatcmpl"}
MAX_IGNORED_NAMES = 16
FIT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TENANT = re.compile(rf"[!-~]{{0,{MAX_NAME}}}")


class GenerateResponse(Response):
    def __init__(self, state: ServerState, kind: Kind) -> None:
        super().__init__()
        self._state = state
        self._kind: Kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        with state.open_request() as stopped:
            prepared = await read_request(state, self._kind, Request(scope, receive), stopped)
            # Ours, not the client's x-request-id: two clients may choose the same.
            request_id = f"{_ID_PREFIX[self._kind]}-{uuid.uuid4().hex}"
            headers = ignored_header(prepared.ignored)
            reply = Reply(_shape(prepared, state.tokenizer), prepared, state.model, request_id)
            async with Generation(state.engine, prepared, request_id, stopped) as generation:
                # Before the 200 goes out: a refusal is an ordinary answer, streamed or not.
                await unless_ended(receive, stopped, generation.submit())
                if prepared.stream:
                    response: Response = EventStream(generation, reply, headers, state.config.keep_alive_s)
                else:
                    answer = await unless_ended(receive, stopped, collect(generation))
                    response = Response(msgspec.json.encode(reply.whole(answer)), 200, headers, "application/json")
                await response(scope, receive, send)


async def read_request(state: ServerState, kind: Kind | None, request: Request, stopped: Stopped) -> Prepared:
    """From body and headers to what the engine gets. Without a `kind` the body tells it."""
    key: Key | None = request.state.key
    tenant = key.tenant if key is not None else tenant_of(request.headers, state.config.tenant_header)
    async with state.bodies.read(request) as body:
        return await unless_ended(request.receive, stopped, prepare_body(state, kind, body, tenant))


async def prepare_body(state: ServerState, kind: Kind | None, body: bytes, tenant: str) -> Prepared:
    """Here what is small, in the prompt worker what is large."""
    if len(body) <= state.config.inline_body_kib << 10:
        return prepare(kind, body, state.tokenizer, state.model, tenant)
    return await state.prompt_worker.prepare(kind, body, tenant)


def tenant_of(headers: Headers, name: str | None) -> str:
    """Whose request it is, by the header that a proxy sets; raises InvalidValueError when it cannot be told."""
    return tenant_among(headers.getlist(name) if name is not None else [], name)


def tenant_among(values: list[str], name: str | None) -> str:
    """The one value of that header, or of what gRPC has for headers."""
    # A second one is the client's own: whose it is must not depend on which of the two is read.
    if len(values) > 1 or not all(TENANT.fullmatch(value) for value in values):
        raise InvalidValueError(f"the header {name} must be given once, with at most {MAX_NAME} visible ASCII "
                                "characters", name)
    return values[0] if values else ""


async def collect(generation: Generation) -> Answer:
    """The whole of an answer."""
    answer = Answer()
    while answer.last is None or answer.last.finish_reason is None:
        output = await generation.next()
        assert output is not None, "without a time-out there is always an event"
        answer.add(output)
    return answer


def _shape(prepared: Prepared, tokenizer: Tokenizer) -> Shape:
    kind = CompletionShape if prepared.kind == "completions" else ChatShape
    return kind(prepared, tokenizer)


def ignored_header(names: list[str]) -> dict[str, str]:
    """Names the fields that had no effect, as far as they are fit for a header."""
    if not names:
        return {}
    shown = [name for name in names[:MAX_IGNORED_NAMES] if FIT_NAME.fullmatch(name)]
    if len(shown) < len(names):
        shown.append(f"+{len(names) - len(shown)}")
    return {"x-ringserve-ignored": ", ".join(shown)}
