"""The routes: one table with an auth level for each, one way in for errors, one for request ids."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, assert_never

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ringserve_api.access import authorize
from ringserve_api.errors import ClientDisconnected, error_response, is_expected
from ringserve_api.estimate import EstimateResponse
from ringserve_api.generate import GenerateResponse
from ringserve_api.keys import Key, bearer
from ringserve_api.prepare import model_not_found
from ringserve_api.state import ServerState

AuthLevel = Literal["open", "user"]
"""`open` for probes; `user` for keys with the scope `inference`."""

Handler = Callable[[Request], Awaitable[Response]]
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger("ringserve.api")


@dataclass(frozen=True)
class Route:
    methods: tuple[str, ...]
    path: str
    auth: AuthLevel
    handler: Handler


def create_app(state: ServerState) -> FastAPI:
    """The ASGI application over `state`. It has no life of its own: see server.py."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for route in routes(Handlers(state)):
        app.add_api_route(route.path, _guarded(route, state), methods=list(route.methods), response_model=None)
    app.add_exception_handler(HTTPException, _refused_by_router)
    app.add_middleware(Edge, state=state)
    return app


def routes(handlers: "Handlers") -> list[Route]:
    probe = ("GET", "HEAD")
    return [
        Route(("POST",), "/v1/completions", "user", handlers.completions),
        Route(("POST",), "/v1/chat/completions", "user", handlers.chat_completions),
        Route(("POST",), "/v1/estimate", "user", handlers.estimate),
        Route(probe, "/v1/models", "user", handlers.models),
        Route(probe, "/v1/models/{model_id:path}", "user", handlers.model),
        Route(probe, "/health", "open", handlers.ready),
        Route(probe, "/livez", "open", handlers.alive),
        Route(probe, "/readyz", "open", handlers.ready),
        Route(probe, "/version", "open", handlers.version),
    ]


def _guarded(route: Route, state: ServerState) -> Handler:
    """The only way from a path to a handler, so that no route forgets its auth level.

    `request.state.key` is the key that came with the request from here on.
    """
    async def endpoint(request: Request) -> Response:
        request.state.key = _key_of(request.headers, route.auth, state)
        return await route.handler(request)
    return endpoint


def _key_of(headers: Headers, level: AuthLevel, state: ServerState) -> Key | None:
    """Raises ApiError unless a request with these headers may use a route of this level."""
    match level:
        case "open":
            return None
        case "user":
            given = headers.getlist("authorization")
            # Whose it is must not depend on which of two is read, by us or by a proxy.
            return authorize(state.keys, bearer(given[0]) if len(given) == 1 else None, "inference")
        case _:
            assert_never(level)


async def _refused_by_router(_: Request, error: Exception) -> Response:
    return error_response(error)


class Handlers:
    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def completions(self, _: Request) -> Response:
        return GenerateResponse(self._state, "completions")

    async def chat_completions(self, _: Request) -> Response:
        return GenerateResponse(self._state, "chat")

    async def estimate(self, _: Request) -> Response:
        return EstimateResponse(self._state)

    async def models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        if name != self._state.model.model_name:
            raise model_not_found(name, self._state.model.model_name)
        return json_response(self._model())

    async def alive(self, _: Request) -> Response:
        dead = self._state.engine.dead is not None
        return json_response({"status": "dead" if dead else "ok"}, 503 if dead else 200)

    async def ready(self, _: Request) -> Response:
        refusal = self._state.unavailable()
        if refusal is None:
            return json_response({"status": "ok"})
        return json_response({"status": refusal.code}, 503)

    async def version(self, _: Request) -> Response:
        return json_response({"version": self._state.model.version})

    def _model(self) -> dict[str, object]:
        return {"id": self._state.model.model_name, "object": "model", "created": self._state.created,
                "owned_by": "ringserve", "max_model_len": self._state.model.max_model_len}


def json_response(payload: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(payload), status, media_type="application/json")


class Edge:
    """Around everything: gives each request its id, and each exception that arrives here its answer."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self._state.draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnected:
            # Nobody reads it, but a request that is never answered would be logged as an error.
            await Response(status_code=499)(scope, receive, send_with_id)
        except Exception as error:
            if not is_expected(error):
                logger.exception("request %s failed", request_id)
            if started:
                raise
            await error_response(error)(scope, receive, send_with_id)
