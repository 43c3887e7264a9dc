"""Inference: the InferenceService. What a call means is written in inference.proto."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import msgspec

from ringserve.errors import ContextLengthError, InvalidValueError
from ringserve.v1 import inference_pb2 as pb
from ringserve.v1 import inference_pb2_grpc
from ringserve_api.errors import ApiError, is_expected
from ringserve_api.generate import collect, prepare_body
from ringserve_api.generation import Generation, refusals_named_for
from ringserve_api.prepare import Kind, Prepared
from ringserve_api.rpc import messages
from ringserve_api.rpc.callers import Context, tenant_of_call
from ringserve_api.rpc.session import Session
from ringserve_api.rpc.sessions import Sessions
from ringserve_api.rpc.status import status_of
from ringserve_api.rpc.upload import Upload
from ringserve_api.state import ServerState

MOST_KEEP_S = 24 * 3600.0
LOST_WITHIN_S = 1.0
T = TypeVar("T")

logger = logging.getLogger("ringserve.api")


def answered(method: Callable[[Any, Any, Context], Awaitable[T]]) -> Callable[[Any, Any, Context], Awaitable[T]]:
    """The only way from an exception to a status."""
    @functools.wraps(method)
    async def call(service: Any, request: Any, context: Context) -> T:
        try:
            return await method(service, request, context)
        except Exception as error:
            if not is_expected(error):
                logger.exception("a call of %s failed", method.__name__)
            await context.abort_with_status(status_of(error))
            raise AssertionError("unreachable") from error
    return call


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, state: ServerState, sessions: Sessions) -> None:
        self._state, self._sessions = state, sessions

    # Requests that outlive their connection

    @answered
    async def Generate(self, requests: Any, context: Context) -> None:
        tenant = tenant_of_call(self._state, context)
        first = await self._next(context)
        which = first.WhichOneof("message")
        if which == "open":
            session, after = await self._open(first.open, tenant, context), 0
        elif which == "resume":
            session, after = self._sessions.find(tenant, first.resume.request_id), first.resume.after_sequence
            session.events.check(after)
        else:
            raise InvalidValueError("the first message must be an Open or a Resume", "message")
        upload = session.upload
        if upload is None:
            raise InvalidValueError("the prompt of this request did not come in chunks: attach to it", "request_id")
        with session.attached():
            async with session.fed(self._feed(session, upload, context)):
                # Only now: another connection that fed it would make this wrong.
                accepted = pb.Event(accepted=pb.Accepted(
                    request_id=session.request_id, received_bytes=upload.received,
                    committed=upload.committed.is_set()))
                if which == "open":
                    session.events.add(accepted)
                else:
                    accepted.sequence = after
                    await context.write(pb.GenerateResponse(event=accepted))
                await self._send(session, after, context, pb.GenerateResponse)

    @answered
    async def Attach(self, request: pb.AttachRequest, context: Context) -> None:
        session = self._sessions.find(tenant_of_call(self._state, context), request.request_id)
        with session.attached():
            await self._send(session, request.after_sequence, context, pb.AttachResponse)

    @answered
    async def Chat(self, request: pb.ChatRequest, context: Context) -> None:
        tenant = tenant_of_call(self._state, context)
        conversation = messages.conversation_of(request.messages)
        prepared = await self._prepared("chat", request, tenant, messages=conversation)
        session = self._begin(request, prepared, None, context)
        with session.attached():
            session.events.add(pb.Event(accepted=pb.Accepted(request_id=session.request_id, committed=True)))
            await self._send(session, 0, context, pb.ChatResponse)

    async def _open(self, request: pb.Open, tenant: str, context: Context) -> Session:
        if request.prompt_kind not in (pb.PROMPT_KIND_TEXT, pb.PROMPT_KIND_TOKEN_IDS):
            raise InvalidValueError("prompt_kind must be PROMPT_KIND_TEXT or PROMPT_KIND_TOKEN_IDS", "prompt_kind")
        # Checked with a prompt that stands for the one to come.
        prepared = messages.to_the_end(await self._prepared("completions", request, tenant, prompt=[0]),
                                       request.sampling)
        n_ctx, output = self._state.model.max_model_len, prepared.params.max_tokens or 1
        announced = request.prompt_tokens
        if request.prompt_kind == pb.PROMPT_KIND_TOKEN_IDS:
            announced = announced or request.prompt_bytes // 4
        if announced + output > n_ctx:
            raise ContextLengthError(announced, output, n_ctx)
        upload = Upload(request.prompt_kind, self._state.tokenizer.around, self._state.prompt_worker,
                        self._state.bodies, tenant, n_ctx, output)
        return self._begin(request, prepared, upload, context, announced)

    def _begin(self, request: pb.Open | pb.ChatRequest, prepared: Prepared, upload: Upload | None, context: Context,
               announced_tokens: int = 0) -> Session:
        keep_s = messages.seconds_of(request.keep, "keep", MOST_KEEP_S)
        deadline_s = prepared.scheduling.deadline_s
        if not keep_s:  # or the call's own deadline is the connection's, not the request's
            deadline_s = messages.least(deadline_s, context.time_remaining())
        return self._sessions.begin(request.request_id, prepared, upload, keep_s, deadline_s, announced_tokens)

    async def _send(self, session: Session, after: int, context: Context, response: Callable[..., Any]) -> None:
        async for event in session.events.read(after):
            await context.write(response(event=event))

    async def _feed(self, session: Session, upload: Upload, context: Context) -> None:
        """Take chunks until the Commit; the next one only when the last has its place."""
        try:
            while not upload.committed.is_set():
                # A client that may be gone for a while may be silent for as long: its connection may be dead, and
                # nobody has noticed yet.
                message = await self._next(context, session.keep_s)
                which = message.WhichOneof("message")
                if which is None:
                    await _be_gone()
                    raise InvalidValueError("the stream ended before its Commit, or a message was empty", "message")
                if which == "chunk":
                    await upload.add(message.chunk)
                elif which == "commit":
                    upload.commit(message.commit)
                else:
                    raise InvalidValueError("after the first message only chunks and a Commit may come", "message")
            if await context.read() is not grpc.aio.EOF:
                raise InvalidValueError("after the Commit nothing may come", "message")
        except Exception as error:
            session.fail(error)

    async def _next(self, context: Context, least_s: float = 0.0) -> pb.GenerateRequest:
        """The client's next message; an empty one when it has no more. Raises ApiError when none comes for long."""
        idle_s = max(self._state.config.body_idle_timeout_s, least_s)
        try:
            async with asyncio.timeout(idle_s):
                message = await context.read()
        except TimeoutError:
            raise ApiError("body_idle_timeout", f"the prompt stopped arriving for {idle_s:g} s") from None
        return pb.GenerateRequest() if message is grpc.aio.EOF else message

    # Short calls

    @answered
    async def GenerateText(self, request: pb.GenerateTextRequest, context: Context) -> pb.GenerateTextResponse:
        began = time.monotonic()
        tenant = tenant_of_call(self._state, context)
        prepared = messages.to_the_end(
            await self._prepared("completions", request, tenant, prompt=_prompt_of(request)), request.sampling)
        prepared = msgspec.structs.replace(prepared, return_progress=False)
        deadline_s = messages.least(prepared.scheduling.deadline_s, context.time_remaining())
        with self._state.open_request() as stopped:
            async with (_deadline(deadline_s),
                        Generation(self._state.engine, prepared, messages.new_id(), stopped) as generation):
                estimate = await generation.submit()
                if estimate is not None:
                    messages.check_in_time(estimate, deadline_s, began)
                answer = await collect(generation)
        assert answer.last is not None
        return pb.GenerateTextResponse(
            request_id=generation.request_id, text=answer.text, token_ids=answer.token_ids,
            logprobs=messages.logprobs(answer.logprobs, self._state.tokenizer),
            finished=messages.finished(answer.last))

    @answered
    async def Estimate(self, request: pb.EstimateRequest, context: Context) -> pb.EstimateResponse:
        tenant = tenant_of_call(self._state, context)
        which = request.WhichOneof("prompt")
        if which == "conversation":
            prepared = await self._prepared(
                "chat", request, tenant, messages=messages.conversation_of(request.conversation.messages))
        elif which == "prompt_tokens":
            prepared = await self._prepared("completions", request, tenant, prompt=[0])
        else:
            prepared = await self._prepared("completions", request, tenant, prompt=_prompt_of(request))
        prepared = messages.to_the_end(prepared, request.sampling)
        if which == "prompt_tokens":
            prepared = messages.unknown_prompt(prepared, request.prompt_tokens, self._state.model.max_model_len)
        with self._state.open_request(), refusals_named_for(prepared.kind):
            estimate = await self._state.engine.estimate(
                prepared.prompt_token_ids, prepared.params, prepared.scheduling)
        return pb.EstimateResponse(estimated=messages.estimated(estimate))

    @answered
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        tenant = tenant_of_call(self._state, context)
        which = request.WhichOneof("prompt")
        if which is None:
            raise InvalidValueError("give a text or a conversation", "prompt")
        with self._state.open_request():
            prepared = await (
                self._prepared("completions", request, tenant, prompt=request.text) if which == "text" else
                self._prepared("chat", request, tenant,
                               messages=messages.conversation_of(request.conversation.messages)))
        return pb.TokenizeResponse(token_ids=prepared.prompt_token_ids)

    @answered
    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        self._sessions.find(tenant_of_call(self._state, context), request.request_id).forget()
        return pb.CancelResponse()

    @answered
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        tenant_of_call(self._state, context)
        model = self._state.model
        return pb.ListModelsResponse(models=[pb.Model(
            name=model.model_name, max_tokens=model.max_model_len, ring_size=model.ring_size,
            server_version=model.version)])

    async def _prepared(self, kind: Kind, request: Any, tenant: str, **prompt: Any) -> Prepared:
        """What the HTTP route would make of the same request."""
        fields = messages.fields_of(kind, request, **prompt)
        prepared = await prepare_body(self._state, kind, msgspec.json.encode(fields), tenant)
        return msgspec.structs.replace(prepared, scheduling=msgspec.structs.replace(
            prepared.scheduling, deadline_s=messages.deadline_of(request)))


async def _be_gone() -> None:
    """A connection that is lost looks like a stream that ended, and a moment later the call is cancelled: give it the
    moment."""
    await asyncio.sleep(LOST_WITHIN_S)


def _prompt_of(request: pb.GenerateTextRequest | pb.EstimateRequest) -> Any:
    """None when there is none, which `prepare` refuses."""
    which = request.WhichOneof("prompt")
    return request.text if which == "text" else list(request.token_ids.ids) if which == "token_ids" else None


@contextlib.asynccontextmanager
async def _deadline(seconds: float | None) -> Any:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise ApiError("deadline_exceeded", f"the request did not end within {seconds:g} s") from None
