"""Reading request bodies within limits: size, idle time, and bytes in flight over all connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError, ClientDisconnected

MIB = 1 << 20


class BodyReader:
    def __init__(self, config: ServerConfig) -> None:
        self._limit = config.max_body_mib * MIB
        self._total_limit = config.max_bodies_mib * MIB
        self._idle_timeout_s = config.body_idle_timeout_s
        self._in_flight = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the whole body; its bytes count as in flight until the block is left."""
        check_content_type(request)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._limit:
            raise self._too_large()
        chunks: list[bytes] = []
        held = 0
        try:
            while True:
                chunk, more = await self._receive(request)
                if held + len(chunk) > self._limit:
                    raise self._too_large()
                self.hold(len(chunk))
                held += len(chunk)
                chunks.append(chunk)
                if not more:
                    break
            body = b"".join(chunks)
            chunks.clear()
            yield body
        finally:
            self.let_go(held)

    def hold(self, count: int) -> None:
        """Count so many bytes as in flight. Raises ApiError when there are too many."""
        if self._in_flight + count > self._total_limit:
            raise ApiError("server_overloaded", "too many large requests are being received", retry_after_s=1)
        self._in_flight += count

    def let_go(self, count: int) -> None:
        self._in_flight -= count

    async def _receive(self, request: Request) -> tuple[bytes, bool]:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                message = await request.receive()
        except TimeoutError:
            raise ApiError("body_idle_timeout",
                           f"the body stopped arriving for {self._idle_timeout_s:g} s") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        return message.get("body", b""), message.get("more_body", False)

    def _too_large(self) -> ApiError:
        return ApiError("request_too_large", f"the body exceeds the limit of {self._limit} bytes")


def check_content_type(request: Request) -> None:
    """JSON only: a web page of another origin cannot send it without asking, so it cannot post here."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("unsupported_media_type", "the body must be sent with content-type application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("unsupported_media_type", "compressed bodies are not supported")
