"""The upload of one prompt: chunks as fast as flow control lets them go, over as many calls as it takes."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import google_crc32c
import grpc

from ringserve.client.errors import ClientError
from ringserve.client.prompt import TOKEN_BYTES, PromptSource
from ringserve.v1 import inference_pb2 as pb

CHUNK_BYTES = 256 * 1024
STATUS_TIMEOUT_S = 5.0
"""For the status of a call that takes no more messages."""

OnUpload = Callable[[int, int], object]
"""Called with (bytes sent, bytes of the prompt) after each chunk."""


class Upload:
    def __init__(self, source: PromptSource, on_upload: OnUpload | None = None) -> None:
        self.failure: BaseException | None = None
        """Why it cannot go on: the file, or `on_upload`. Not a lost connection, which ends the call itself."""
        self._source = source
        self._on_upload = on_upload
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        """Bytes in the hash. The server never has more, so going back needs no second hash."""
        self._sending: asyncio.Task[None] | None = None
        self._place: asyncio.Future[int | None] | None = None

    def start(self, call: "grpc.aio.StreamStreamCall[Any, Any]", opening: pb.Open) -> None:
        """Send the whole prompt."""
        self._begin(call, pb.GenerateRequest(open=opening))
        self.go_on(0)

    def resume(self, call: "grpc.aio.StreamStreamCall[Any, Any]", resume: pb.Resume) -> None:
        """Send what is missing, as soon as `go_on` says what that is."""
        self._begin(call, pb.GenerateRequest(resume=resume))

    def go_on(self, offset: int | None) -> None:
        """From this byte; None: the server has it all. The first word counts."""
        assert self._place is not None
        if not self._place.done():
            self._place.set_result(offset)

    async def stop(self) -> None:
        """When its call has ended."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
            self._sending = None

    async def messages(self, offset: int) -> AsyncIterator[tuple[pb.GenerateRequest, int]]:
        """The rest of the prompt, and its end; with each message, the bytes that are sent with it."""
        source, total = self._source, self._source.total_bytes
        if offset > self._hashed or (source.kind == pb.PROMPT_KIND_TOKEN_IDS and offset % TOKEN_BYTES):
            raise ClientError(f"the server asks for the prompt from byte {offset} on, but {self._hashed} were sent",
                              code="protocol_error", status=grpc.StatusCode.INTERNAL)
        while offset < total:
            data = await source.read(offset, min(CHUNK_BYTES, total - offset))
            self._hash(offset, data)
            chunk = pb.PromptChunk(offset=offset, data=data, crc32c=google_crc32c.value(data))
            offset += len(data)
            yield pb.GenerateRequest(chunk=chunk), offset
        assert self._hashed == total
        yield pb.GenerateRequest(commit=pb.Commit(total_bytes=total, sha256=self._sha256.digest())), total

    def _hash(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self._hashed:
            self._sha256.update(memoryview(data)[self._hashed - offset:])
            self._hashed = offset + len(data)

    def _begin(self, call: "grpc.aio.StreamStreamCall[Any, Any]", first: pb.GenerateRequest) -> None:
        assert self._sending is None
        self._place = asyncio.get_running_loop().create_future()
        self._sending = asyncio.create_task(self._send(call, first, self._place), name="prompt upload")

    async def _send(self, call: "grpc.aio.StreamStreamCall[Any, Any]", first: pb.GenerateRequest,
                    place: "asyncio.Future[int | None]") -> None:
        try:
            await _write(call, first)
            # No time-out: whoever reads the call has one, and ends it.
            offset = await place
            if offset is not None:
                async for message, sent in self.messages(offset):
                    await _write(call, message)
                    if self._on_upload is not None and message.HasField("chunk"):
                        self._on_upload(sent, self._source.total_bytes)
            await call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
            await _end(call)
        except Exception as error:
            self.failure = error
            call.cancel()


async def _write(call: "grpc.aio.StreamStreamCall[Any, Any]", message: pb.GenerateRequest) -> None:
    """Returns when flow control has let the message go.

    `call.write` would do, but when the server ends the call meanwhile it puts INTERNAL in the place of the server's
    status (github.com/grpc/grpc/issues/36066): the reason of a refusal would be lost."""
    await call.wait_for_connection()
    await call._cython_call.send_serialized_message(message.SerializeToString())  # type: ignore[attr-defined]


async def _end(call: "grpc.aio.StreamStreamCall[Any, Any]") -> None:
    """After a write that failed: its status should be there, or on its way."""
    try:
        await asyncio.wait_for(call.code(), STATUS_TIMEOUT_S)
    except TimeoutError:
        call.cancel()
