"""AsyncEngine: the engine process as seen from asyncio. Requests go in, each gets a stream of RequestOutput."""

import asyncio
import importlib.metadata
import logging
import socket
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ringserve.channel import encode_frame
from ringserve.config import EngineConfig
from ringserve.detokenizer import Detokenizer
from ringserve.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    InvalidValueError,
    OverloadedError,
    RequestError,
    StartupError,
    error_named,
)
from ringserve.outputs import Estimate
from ringserve.plan import pack_ids
from ringserve.processes import ChildProcess
from ringserve.request_stream import RequestStream
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams
from ringserve.tokenizer import Tokenizer
from ringserve.updates import (
    AddRequest,
    Admission,
    AskEstimate,
    CancelRequest,
    EngineFailed,
    EngineReady,
    EngineSetup,
    Report,
    StartupFailed,
    Updates,
)

logger = logging.getLogger(__name__)

STALL_S = 60.0
"""Beyond the time-out of a step: an engine that says nothing for so long hangs."""
START_TIMEOUT_S = 3600.0
"""For loading the weights of a large model from a slow disk, twice over."""
NEEDLE = "needle"
"""The name of the embedded model."""


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What clients may know of a running engine."""

    model_name: str
    max_model_len: int
    """Longest prompt and output together, in tokens: the model's limit and the cache's."""
    vocab_size: int
    ring_size: int
    version: str
    default_sampling: dict[str, float]
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    dtype: str
    prefix_cache: bool
    """Whether what one request computed is found by the next."""
    decisions: tuple[str, ...]
    pids: tuple[int, ...]
    """Of the engine, then of each rank."""


class AsyncEngine:
    """Use `await AsyncEngine.start(config)`; `close()` ends all its processes."""

    def __init__(self, process: ChildProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
                 info: EngineInfo, tokenizer: Tokenizer, end_token_ids: tuple[int, ...], most_requests: int,
                 answer_timeout_s: float) -> None:
        self.info, self.tokenizer = info, tokenizer
        self.dead: EngineDeadError | None = None
        self._process, self._reader, self._writer = process, reader, writer
        self._end_token_ids = end_token_ids
        self._answer_timeout_s = answer_timeout_s
        """For the engine's word on a request: it comes between two steps."""
        self.most_requests = most_requests
        """Running and queued together; more are refused."""
        self._streams: dict[str, RequestStream] = {}
        self._admissions: dict[str, asyncio.Future[Admission]] = {}
        """What the engine has not said a word on yet."""
        self._questions = 0
        self._death = asyncio.Event()
        self._closing = False
        self._pump = asyncio.create_task(self._read(), name="engine updates")

    @classmethod
    async def start(cls, config: EngineConfig) -> "AsyncEngine":
        """Start the engine and its ranks, load the model, warm up.

        Raises StartupError (the operator's) or EngineError (ours)."""
        from ringserve.model.checkpoint import read_checkpoint

        directory = await asyncio.to_thread(resolve_model, config.model.model)
        # First of all, so that its ranks import torch while this process reads the tokenizer.
        process = ChildProcess("ringserve.engine_process", Report)
        reader, writer = await _streams_of(process.socket)
        try:
            writer.write(encode_frame(EngineSetup(config=config, checkpoint=directory)))
            checkpoint = await asyncio.to_thread(read_checkpoint, replace(config.model, model=directory))
            tokenizer = await asyncio.to_thread(Tokenizer, directory)
            try:
                ready = await asyncio.wait_for(_receive(reader), START_TIMEOUT_S)
            except TimeoutError:
                raise EngineDeadError(f"the engine did not start within {START_TIMEOUT_S:.0f} s") from None
            except (asyncio.IncompleteReadError, OSError):
                code = await asyncio.to_thread(process.exit_code, 1.0)
                raise EngineDeadError(f"the engine process ended while it started (exit code {code})") from None
            if isinstance(ready, StartupFailed):
                kind = error_named(ready.kind, StartupError)
                raise EngineDeadError(ready.message, ready.rank) if kind is None else kind(ready.message)
            assert isinstance(ready, EngineReady), type(ready)
        except BaseException:
            writer.transport.abort()
            await asyncio.to_thread(process.close)
            raise
        info = EngineInfo(
            model_name=config.model.model if config.model.model == NEEDLE else Path(directory).resolve().name,
            max_model_len=ready.max_model_len, vocab_size=checkpoint.vocab_size, ring_size=ready.ring_size,
            version=importlib.metadata.version("ringserve"), default_sampling=checkpoint.default_sampling,
            kv_capacity_tokens=ready.kv_capacity_tokens, kv_bytes_per_token=ready.kv_bytes_per_token,
            dtype=ready.dtype, prefix_cache=config.cache.prefix_cache, decisions=tuple(ready.decisions),
            pids=(process.pid, *ready.pids))
        most = config.scheduler.most_running + config.scheduler.max_waiting_requests
        return cls(process, reader, writer, info, tokenizer, checkpoint.eos_token_ids, most,
                   config.ring.step_timeout_s + STALL_S)

    # Requests

    async def submit(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams, *, request_id: str,
                     return_progress: bool = False, scheduling: SchedulingParams | None = None,
                     ) -> RequestStream:
        """Queue a request; returns when the engine has taken it. Raises RequestError or EngineDeadError before any work
        is done.

        The stream ends after the output with a finish reason, or raises EngineError. Leaving it early does not
        stop the request: `cancel` does."""
        self._check_alive()
        if request_id in self._streams:
            raise InvalidValueError(f"request id {request_id!r} is already in use", "request_id")
        if len(self._streams) >= self.most_requests:
            raise OverloadedError(f"{len(self._streams)} requests are running or queued, which is the limit")
        token_ids = self.validate(prompt_token_ids, params)
        stream = RequestStream(request_id, len(token_ids), Detokenizer(self.tokenizer, token_ids, params),
                               self._end_token_ids, lambda: self.cancel(request_id, satisfied=True))
        self._streams[request_id] = stream
        try:
            stream.estimate = await self._admission(AddRequest(
                request_id=request_id, token_ids=pack_ids(token_ids), params=params, return_progress=return_progress,
                end_token_ids=self._end_token_ids, scheduling=scheduling or SchedulingParams()))
        except asyncio.CancelledError:
            await self.cancel(request_id)
            raise
        except BaseException:
            self._streams.pop(request_id, None)
            raise
        return stream

    async def estimate(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams,
                       scheduling: SchedulingParams | None = None) -> Estimate:
        """What would become of a request. Queues nothing. Raises what `submit` would."""
        self._check_alive()
        token_ids = self.validate(prompt_token_ids, params)
        self._questions += 1
        return await self._admission(AskEstimate(request=AddRequest(
            request_id=f"estimate/{self._questions}", token_ids=pack_ids(token_ids), params=params,
            end_token_ids=self._end_token_ids, scheduling=scheduling or SchedulingParams())))

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise self.dead

    async def _admission(self, command: AddRequest | AskEstimate) -> Estimate:
        """Send a command and wait for the engine's word on it: it comes between two steps."""
        request_id = command.request.request_id if isinstance(command, AskEstimate) else command.request_id
        answered: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        self._admissions[request_id] = answered
        try:
            self._send(command)
            answer = await asyncio.wait_for(answered, self._answer_timeout_s)
        except TimeoutError:
            raise EngineError(f"the engine gave no answer within {self._answer_timeout_s:.0f} s") from None
        finally:
            self._admissions.pop(request_id, None)
        if answer.estimate is None:
            raise _refusal(answer)
        return answer.estimate

    def validate(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams) -> "array[int]":
        """The prompt as u32 ids, found to fit. Raises RequestError."""
        if len(prompt_token_ids) == 0:
            raise InvalidValueError("the prompt is empty: it needs at least one token", "prompt")
        vocabulary = self.info.vocab_size
        try:
            token_ids = array("I", prompt_token_ids)
        except (OverflowError, TypeError) as error:
            raise InvalidValueError(f"token ids must be integers in 0 to {vocabulary - 1}", "prompt") from error
        if (largest := int(np.frombuffer(token_ids, np.uint32).max())) >= vocabulary:
            raise InvalidValueError(f"token id {largest} is outside the vocabulary of {vocabulary}", "prompt")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if outside := [token for token in ids if token >= vocabulary]:
                raise InvalidValueError(f"token id {outside[0]} is outside the vocabulary of {vocabulary}", name)
        limit, output = self.info.max_model_len, params.max_tokens or 1
        if len(token_ids) + output > limit:
            raise ContextLengthError(len(token_ids), output, limit)
        return token_ids

    async def cancel(self, request_id: str, satisfied: bool = False) -> None:
        """Stop a request before the next step. Nothing happens when it has ended already. `satisfied`: because its
        client has all it wanted."""
        stream = self._streams.pop(request_id, None)
        if stream is not None and self.dead is None and not self._closing:
            self._send(CancelRequest(request_id=request_id, satisfied=satisfied))
            stream.fail(EngineError("the request was cancelled"))

    # Life

    async def died(self) -> EngineDeadError:
        """Returns when the engine or one of its ranks is gone."""
        await self._death.wait()
        assert self.dead is not None
        return self.dead

    async def close(self) -> None:
        """End the engine and its ranks; open requests end with an error. Returns when they are gone."""
        if not self._closing:
            await self.let_go()
            await asyncio.to_thread(self.join)

    async def let_go(self) -> None:
        """The first half of `close`: tell the engine to end."""
        self._closing = True
        self._pump.cancel()
        self._die(EngineDeadError("the engine was closed"))
        self._writer.transport.abort()

    def join(self) -> None:
        """The second half, for a thread: wait until its processes are gone. Starts no thread of its own, which an
        interpreter that is ending would refuse."""
        self._process.close()

    def _send(self, command: Any) -> None:
        self._writer.write(encode_frame(command))

    async def _read(self) -> None:
        try:
            while True:
                report = await _receive(self._reader)
                if isinstance(report, Updates):
                    for update in report.updates:
                        if (stream := self._streams.get(update.request_id)) is not None:
                            stream.feed(update)
                            if update.finish_reason is not None:
                                del self._streams[update.request_id]
                elif isinstance(report, Admission):
                    answered = self._admissions.get(report.request_id)
                    if answered is not None and not answered.done():
                        answered.set_result(report)
                elif isinstance(report, EngineFailed):
                    self._die(EngineDeadError(report.message, report.rank))
                    return
        except (asyncio.IncompleteReadError, OSError):
            code = await asyncio.to_thread(self._process.exit_code, 2.0)
            how = "closed its connection" if code is None else (
                f"was ended by signal {-code}" if code < 0 else f"exited with code {code}")
            self._die(EngineDeadError(f"the engine process {how}"))
        except Exception as error:
            logger.exception("what the engine sent cannot be read")
            self._die(EngineDeadError(f"what the engine sent cannot be read: {type(error).__name__}"))

    def _die(self, error: EngineDeadError) -> None:
        if self.dead is None:
            self.dead = error
            self._death.set()
            streams, self._streams = self._streams, {}
            for stream in streams.values():
                stream.fail(error)
            for answered in self._admissions.values():
                if not answered.done():
                    answered.set_exception(error)


def resolve_model(model: str) -> str:
    """The directory of a model: `needle` is made when it is first asked for. Raises StartupError."""
    if model == NEEDLE:
        from ringserve.needle import needle_directory

        try:
            return str(needle_directory())
        except OSError as error:
            raise ConfigError(f"the embedded model cannot be written to the cache directory: {error}") from error
    if not Path(model).exists():
        raise CheckpointError(f"model directory {model} does not exist: the model is a directory on this machine "
                              f"(nothing is downloaded), or `{NEEDLE}`")
    return model


def _refusal(answer: Admission) -> RequestError:
    """The error that the engine process refused a request with."""
    assert answer.refusal is not None
    kind = error_named(answer.kind, RequestError)
    if kind is OverloadedError:
        return OverloadedError(answer.refusal, answer.retry_after_s)
    return InvalidValueError(answer.refusal, answer.param)


async def _streams_of(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock.setblocking(False)
    return await asyncio.open_connection(sock=sock)


async def _receive(reader: asyncio.StreamReader) -> Report:
    size = struct.unpack("<I", await reader.readexactly(4))[0]
    return _DECODER.decode(await reader.readexactly(size))


_DECODER: "msgspec.msgpack.Decoder[Report]" = msgspec.msgpack.Decoder(Report)
