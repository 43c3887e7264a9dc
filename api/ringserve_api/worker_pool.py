"""PromptWorker: the server's end of the prompt worker process, started when needed and again when it dies."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from array import array

import msgspec

from ringserve_api.engine_port import ServedModel, Tokenizer, TokenizerRecipe
from ringserve_api.errors import ApiError, PreparationError
from ringserve_api.prepare import Kind, Prepared, from_little_endian
from ringserve_api.prompt_worker import HEADER, Encoded, EncodePart, EncodeWhole, Failed, Job, PrepareBody, Reply, Start

logger = logging.getLogger("ringserve.api")


class PromptWorker:
    """Does one job at a time in another process; callers queue for it.

    Whatever goes wrong (a crash, a time-out, a caller that is cancelled) the process is killed and the next
    one starts afresh, so the two ends never disagree about which reply belongs to which job.
    """

    def __init__(self, tokenizer: Tokenizer, model: ServedModel, timeout_s: float) -> None:
        start = Start(model=model, tokenizer=TokenizerRecipe.of(tokenizer))
        self._start_frame = msgspec.msgpack.encode(start)
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def prepare(self, kind: Kind | None, body: bytes, tenant: str = "") -> Prepared:
        """Do what `prepare.prepare` does, without holding up the event loop."""
        reply = await self._do(PrepareBody(kind=kind, body=body, tenant=tenant))
        assert isinstance(reply, Prepared)
        return reply

    async def encode_part(self, text: str, *, final: bool, tenant: str) -> "tuple[array[int], int]":
        """`Tokenizer.encode_part`, likewise."""
        reply = await self._do(EncodePart(text=text, final=final, tenant=tenant))
        assert isinstance(reply, Encoded)
        return from_little_endian(reply.token_ids), reply.characters

    async def encode_at_once(self, text: str) -> "array[int]":
        """`Tokenizer.encode_at_once`, likewise."""
        reply = await self._do(EncodeWhole(text=text))
        assert isinstance(reply, Encoded)
        return from_little_endian(reply.token_ids)

    async def _do(self, job: Job) -> Prepared | Encoded:
        async with self._lock:
            finished = False
            try:
                async with asyncio.timeout(self._timeout_s):
                    reply = await self._exchange(job)
                finished = True
            except TimeoutError:
                raise ApiError("deadline_exceeded",
                               f"the prompt could not be prepared within {self._timeout_s:g} s") from None
            except (OSError, EOFError, msgspec.MsgspecError) as error:
                logger.warning("the prompt worker failed (%s); the next one starts", type(error).__name__)
                raise ApiError("prompt_worker_failed", "the prompt worker failed") from None
            finally:
                if not finished:
                    await self._kill()
        if isinstance(reply, Failed):
            raise PreparationError(reply.error)
        return reply

    async def start(self) -> None:
        """Start the process now, so that the first large prompt does not wait for it."""
        async with self._lock:
            await self._ensure_process()

    async def close(self) -> None:
        """Kill the process; a job that waits for it fails."""
        await self._kill()

    async def _exchange(self, job: Job) -> Reply:
        if self._process is not None and self._process.returncode is not None:
            await self._kill()
        await self._ensure_process()
        self._write_frame(msgspec.msgpack.encode(job))
        await self._writer.drain()
        (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        return self._decoder.decode(await self._reader.readexactly(length))

    def _write_frame(self, frame: bytes) -> None:
        self._writer.write(HEADER.pack(len(frame)))
        self._writer.write(frame)

    async def _ensure_process(self) -> None:
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        try:
            # -P and our own path: the worker sees the modules that this process sees, and not whatever lies
            # in the working directory. A new session, because Ctrl+C is for the server to handle.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "ringserve_api.prompt_worker", str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
        except BaseException:
            writer.close()
            raise
        finally:
            theirs.close()
        self._process, self._reader, self._writer = process, reader, writer
        self._write_frame(self._start_frame)

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._writer.transport.abort()  # and not close(): what is still to be written has no reader
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await process.wait()
