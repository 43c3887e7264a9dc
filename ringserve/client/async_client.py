"""AsyncClient: the gRPC API on asyncio."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from ringserve.client.calls import Calls, ChatCalls, GenerateCalls
from ringserve.client.channel import Certificates, open_channel, stub_of
from ringserve.client.errors import ClientError, closed, error_of
from ringserve.client.event_stream import EventStream
from ringserve.client.events import (
    Accepted,
    Answer,
    Delta,
    Estimated,
    Event,
    Finished,
    Model,
    TokenLogprob,
    estimated_of,
    model_of,
)
from ringserve.client.options import Options, check_names, duration_of, messages_of, sampling_of, scheduling_of
from ringserve.client.prompt import TOKEN_BYTES, Prompt, PromptSource, encode, prompt_source
from ringserve.client.upload import OnUpload, Upload
from ringserve.v1 import inference_pb2 as pb
from ringserve.v1.inference_pb2_grpc import InferenceServiceStub

UNARY_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 2.0
REQUEST_ID_BYTES = 24
"""Who knows a request's id can come back to it: it must be hard to guess."""

Messages = Sequence[Mapping[str, str]]


class AsyncClient:
    """A server, as one event loop sees it. An async context manager.

    `model` is what a call that names none asks for. `keep_s` is how long a request outlives its connection, on both
    sides: for so long the client tries to come back, and the server waits for it; 0 does without. `api_key` should
    not be sent without certificates over a network that others can read."""

    def __init__(self, target: str, *, api_key: str | None = None, root_certificates: Certificates | None = None,
                 client_certificate: tuple[Certificates, Certificates] | None = None, model: str | None = None,
                 keep_s: float = 60.0, connect_timeout_s: float = 10.0) -> None:
        self.target = target
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        self._certificates = root_certificates, client_certificate
        self._model = model or ""
        self._keep_s, self._connect_timeout_s = keep_s, connect_timeout_s
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._streams: set[EventStream] = set()

    # Requests

    async def generate(self, prompt: Prompt, *, model: str | None = None, on_upload: OnUpload | None = None,
                       **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """The events of one prompt's answer, from Accepted to Finished. The prompt goes up meanwhile; `on_upload` is
        called with (bytes sent, bytes of the prompt).

        A lost connection is taken up again without a gap or a repetition. Leaving the loop early cancels the request.
        Raises ClientError; OSError for a file that cannot be read."""
        check_names(options)
        source = prompt_source(prompt)
        opening = pb.Open(
            model=self._model if model is None else model, prompt_kind=source.kind, sampling=sampling_of(options),
            scheduling=scheduling_of(options), keep=duration_of(self._keep_s, "keep_s"), request_id=_request_id(),
            **_size(source))
        stub = await self._connect()
        async for event in self._stream(GenerateCalls(stub, self._metadata, opening, Upload(source, on_upload))):
            yield event

    async def chat(self, messages: Messages, *, model: str | None = None,
                   **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """The same events for a conversation: dicts of `role` and `content`."""
        check_names(options)
        request = pb.ChatRequest(
            model=self._model if model is None else model, messages=messages_of(messages),
            sampling=sampling_of(options), scheduling=scheduling_of(options),
            keep=duration_of(self._keep_s, "keep_s"), request_id=_request_id())
        stub = await self._connect()
        async for event in self._stream(ChatCalls(stub, self._metadata, request)):
            yield event

    async def generate_text(self, prompt: Prompt, *, model: str | None = None, on_upload: OnUpload | None = None,
                            **options: Unpack[Options]) -> Answer:
        """The whole answer of `generate`, for a prompt of any length."""
        request_id, text = "", []
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        finished: Finished | None = None
        events = self.generate(prompt, model=model, on_upload=on_upload, **options)
        async with contextlib.aclosing(events):
            async for event in events:
                match event:
                    case Accepted():
                        request_id = event.request_id
                    case Delta():
                        text.append(event.text)
                        token_ids += event.token_ids
                        logprobs += event.logprobs
                    case Finished():
                        finished = event
        assert finished is not None
        return Answer(request_id=request_id, text="".join(text), token_ids=token_ids, logprobs=logprobs,
                      finish_reason=finished.reason, stop=finished.stop, usage=finished.usage)

    async def estimate(self, prompt: str | Sequence[int] | None = None, *, prompt_tokens: int | None = None,
                       messages: Messages | None = None, model: str | None = None,
                       **options: Unpack[Options]) -> Estimated:
        """What would become of a request: of a text, of ids, of `messages`, or of so many tokens of which nothing is
        computed already. Queues nothing."""
        check_names(options)
        if sum(given is not None for given in (prompt, prompt_tokens, messages)) != 1:
            raise TypeError("give one of: a prompt, prompt_tokens, messages")
        request = pb.EstimateRequest(model=self._model if model is None else model, prompt_tokens=prompt_tokens,
                                     sampling=sampling_of(options), scheduling=scheduling_of(options))
        if messages is not None:
            request.conversation.messages.extend(messages_of(messages))
        elif isinstance(prompt, str):
            request.text = encode(prompt).decode()
        elif prompt is not None:
            request.token_ids.ids.extend(prompt)
        reply: pb.EstimateResponse = await self._ask("Estimate", request)
        return estimated_of(reply.estimated)

    async def tokenize(self, prompt: str | Messages, *, model: str | None = None) -> list[int]:
        """The ids of a text, or of a conversation."""
        request = pb.TokenizeRequest(model=self._model if model is None else model)
        if isinstance(prompt, str):
            request.text = encode(prompt).decode()
        else:
            request.conversation.SetInParent()
            request.conversation.messages.extend(messages_of(prompt))
        reply: pb.TokenizeResponse = await self._ask("Tokenize", request)
        return list(reply.token_ids)

    async def cancel(self, request_id: str) -> None:
        """End a request, whoever reads it."""
        await self._ask("Cancel", pb.CancelRequest(request_id=request_id))

    async def models(self) -> list[Model]:
        reply: pb.ListModelsResponse = await self._ask("ListModels", pb.ListModelsRequest())
        return [model_of(model) for model in reply.models]

    # Life

    async def close(self) -> None:
        """Cancel what is under way, and hang up."""
        self._closed = True
        await asyncio.gather(*(stream.end() for stream in self._streams), return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self.close()

    async def _stream(self, calls: Calls) -> AsyncGenerator[Event, None]:
        stream = EventStream(calls, self._keep_s, self._cancel_quietly)
        self._streams.add(stream)
        events = stream.events()
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        finally:
            self._streams.discard(stream)

    async def _cancel_quietly(self, request_id: str) -> None:
        """Without an error where the server is gone: then it ends the request itself, after `keep_s`."""
        assert self._channel is not None
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub_of(self._channel).Cancel(
                pb.CancelRequest(request_id=request_id), timeout=CANCEL_TIMEOUT_S, metadata=self._metadata)

    async def _ask(self, method: str, request: Any) -> Any:
        stub = await self._connect()
        try:
            return await getattr(stub, method)(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from None

    async def _connect(self) -> InferenceServiceStub:
        """Late, because a channel belongs to the loop that runs when it is made."""
        if self._closed:
            raise closed()
        if self._channel is None:
            self._channel = open_channel(self.target, *self._certificates, self._connect_timeout_s)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), self._connect_timeout_s)
        except TimeoutError:
            raise ClientError(f"no connection to {self.target} within {self._connect_timeout_s:g} s",
                              code="connection_failed", status=grpc.StatusCode.UNAVAILABLE) from None
        return stub_of(self._channel)


def _request_id() -> str:
    return secrets.token_urlsafe(REQUEST_ID_BYTES)


def _size(source: PromptSource) -> dict[str, int]:
    if source.kind == pb.PROMPT_KIND_TOKEN_IDS:
        return {"prompt_tokens": source.total_bytes // TOKEN_BYTES}
    return {"prompt_bytes": source.total_bytes}
