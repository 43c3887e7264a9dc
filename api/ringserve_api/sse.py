"""Server-sent events as OpenAI's clients want them, and the response that streams a Generation.

No `id:` and no `retry:` lines: after one of them a comment makes the openai client fail. Every stream ends
with a finish reason or an error object, and then `[DONE]`: clients take a cut stream for success.
"""

import asyncio
import logging

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringserve_api.errors import is_expected, wire_error
from ringserve_api.generation import Generation, cancelled, disconnected
from ringserve_api.reply import Reply

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("ringserve.api")
_encoder = msgspec.json.Encoder()


def event(payload: object) -> bytes:
    # JSON holds no line end, so one `data:` line is always enough.
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class EventStream(Response):
    """Streams what the generation gives until it ends or the client goes."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, reply: Reply, headers: dict[str, str],
                 keep_alive_s: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        self._generation = generation
        self._reply = reply
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        streaming = asyncio.create_task(self._stream(send))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({streaming, gone}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        finally:
            await cancelled(streaming, gone)

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send(send, event(self._reply.opening()))
            await self._stream_outputs(send)
        except Exception as error:
            # The 200 has gone out, so the error travels in the stream.
            if not is_expected(error):
                logger.exception("request %s failed while it was streamed", self._generation.request_id)
            await self._send(send, event(wire_error(error).body))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _stream_outputs(self, send: Send) -> None:
        finished = False
        while not finished:
            output = await self._generation.next(self._keep_alive_s)
            if output is None:
                await self._send(send, KEEP_ALIVE)
                continue
            for chunk in self._reply.chunks(output):
                await self._send(send, event(chunk))
            finished = output.finish_reason is not None

    async def _send(self, send: Send, data: bytes) -> None:
        # Waits while the client reads slowly: what the engine gives meanwhile stays in the engine's queue.
        await send({"type": "http.response.body", "body": data, "more_body": True})
