"""An InferenceService that answers every prompt with its SHA-256, and breaks where a test tells it to."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NoReturn

import google_crc32c
import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ringserve.v1 import inference_pb2 as pb
from ringserve.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server

DELTAS = 32
TIMEOUT_S = 10.0


@dataclass
class Fault:
    """Where a request breaks: at the `count`-th `place`, once or from then on."""

    place: str
    """open, accepted, chunk, commit, committed, prefill, delta, attach"""
    count: int = 1
    strike: Callable[[grpc.ServicerContext], object] = lambda context: context.abort(
        grpc.StatusCode.UNAVAILABLE, "Socket closed")
    always: bool = False


@dataclass
class Held:
    """A request as the server has it."""

    opening: Any
    data: bytearray = field(default_factory=bytearray)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Offset and size, in the order in which they came."""
    committed: bool = False
    log: list[Any] = field(default_factory=list)


class FakeService(InferenceServiceServicer):
    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.cancelled: list[str] = []
        self.was_cancelled = threading.Event()
        self.calls: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.faults: list[Fault] = []
        self.hold: threading.Event | None = None
        """Waited for before the second chunk is read."""
        self.endless = False

    @property
    def only(self) -> Held:
        [held] = self.held.values()
        return held

    def Generate(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        self._note("generate", context)
        first = next(requests)
        if first.HasField("open"):
            self._reach("open", context)
            held = self.held[first.open.request_id] = Held(first.open)
            request_id, after = first.open.request_id, 0
        else:
            self.calls[-1] = "resume"
            request_id, after = first.resume.request_id, first.resume.after_sequence
            held = self._find(request_id, context)
        yield _response(_accepted(request_id, held))
        self._reach("accepted", context)
        if not held.committed:
            self._receive(held, requests, context)
        yield from map(_response, self._answer(held, after, context))

    def Attach(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note("attach", context)
        held = self._find(request.request_id, context)
        self._reach("attach", context)
        for event in self._answer(held, request.after_sequence, context):
            yield pb.AttachResponse(event=event)

    def Chat(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note("chat", context)
        self._reach("open", context)
        held = self.held[request.request_id] = Held(request)
        held.data += "".join(f"{m.role}: {m.content}\n" for m in request.messages).encode()
        self._commit(held)
        yield pb.ChatResponse(event=_accepted(request.request_id, held))
        self._reach("accepted", context)
        for event in self._answer(held, 0, context):
            yield pb.ChatResponse(event=event)

    def Estimate(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note("estimate", context)
        tokens = request.prompt_tokens or len(request.token_ids.ids) or len(request.text)
        return pb.EstimateResponse(estimated=pb.Estimated(prompt_tokens=tokens, ring_width=2, first_token_ms=0))

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note("tokenize", context)
        if request.HasField("conversation"):
            return pb.TokenizeResponse(token_ids=[len(m.content) for m in request.conversation.messages])
        return pb.TokenizeResponse(token_ids=request.text.encode())

    def Cancel(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.cancelled.append(request.request_id)
        self.was_cancelled.set()
        return pb.CancelResponse()

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note("models", context)
        return pb.ListModelsResponse(models=[pb.Model(name="needle", max_tokens=4096, ring_size=2)])

    def _receive(self, held: Held, requests: Iterator[Any], context: grpc.ServicerContext) -> None:
        for number, message in enumerate(requests):
            if number == 1 and self.hold is not None:
                assert self.hold.wait(TIMEOUT_S)
            if message.HasField("commit"):
                assert message.commit.total_bytes == len(held.data)
                assert message.commit.sha256 == sha256(held.data).digest(), "the hash is wrong"
                if not held.data:
                    refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "invalid_value", "the prompt is empty",
                           param="prompt")
                self._reach("commit", context)
                self._commit(held)
                self._reach("committed", context)
                return
            chunk = message.chunk
            assert chunk.offset == len(held.data), "a gap or a repetition"
            assert chunk.crc32c == google_crc32c.value(chunk.data)
            held.data += chunk.data
            held.chunks.append((chunk.offset, len(chunk.data)))
            self._reach("chunk", context)

    def _commit(self, held: Held) -> None:
        held.committed = True
        digest = sha256(held.data).hexdigest()
        held.log = [pb.Event(sequence=2, estimated=pb.Estimated(prompt_tokens=len(held.data), queue_ms=0))]
        for number in range(DELTAS):
            held.log.append(pb.Event(sequence=3 + number, delta=pb.Delta(
                text=digest[2 * number:2 * number + 2], token_ids=[number],
                logprobs=[pb.TokenLogprob(token_id=number, logprob=-1.0, token=b"x")])))
        held.log.append(pb.Event(sequence=3 + DELTAS, finished=pb.Finished(
            reason=pb.FINISH_REASON_LENGTH, usage=pb.Usage(prompt_tokens=7, completion_tokens=DELTAS))))

    def _answer(self, held: Held, after: int, context: grpc.ServicerContext) -> Iterator[Any]:
        for event in held.log:
            if event.sequence == 3:
                yield pb.Event(sequence=2, prefill_progress=pb.PrefillProgress(total_tokens=7, percent=50.0))
                self._reach("prefill", context)
            if event.sequence > after:
                yield event
            if event.HasField("delta"):
                self._reach("delta", context)
                if self.endless:
                    self.was_cancelled.wait(TIMEOUT_S)
                    context.abort(grpc.StatusCode.CANCELLED, "cancelled")

    def _reach(self, place: str, context: grpc.ServicerContext) -> None:
        for fault in self.faults:
            if fault.place == place:
                fault.count -= 1
                if fault.count == 0 or (fault.always and fault.count < 0):
                    fault.strike(context)
                    # Where it was the connection that was struck.
                    context.abort(grpc.StatusCode.ABORTED, "struck")

    def _find(self, request_id: str, context: grpc.ServicerContext) -> Held:
        if request_id not in self.held:
            refuse(context, grpc.StatusCode.NOT_FOUND, "not_found", "there is no such request")
        return self.held[request_id]

    def _note(self, call: str, context: grpc.ServicerContext) -> None:
        self.calls.append(call)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata()})


def refuse(context: grpc.ServicerContext, status: grpc.StatusCode, reason: str, message: str, *,
           param: str | None = None, retry_after_s: int | None = None) -> NoReturn:
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="ringserve", metadata={"n_ctx": "8"})]
    if param is not None:
        details.append(error_details_pb2.BadRequest(field_violations=[{"field": param}]))
    if retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=retry_after_s)))
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    context.abort_with_status(rpc_status.to_status(
        status_pb2.Status(code=status.value[0], message=message, details=packed)))
    raise AssertionError("abort returned")


@contextmanager
def serving(service: FakeService) -> Iterator[int]:
    """The port of a server. It runs on threads: the loops of a test are the clients' own."""
    pool = futures.ThreadPoolExecutor(8)
    server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
    add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        assert server.stop(0).wait(TIMEOUT_S)
        pool.shutdown(wait=True, cancel_futures=True)


def _accepted(request_id: str, held: Held) -> Any:
    return pb.Event(sequence=1, accepted=pb.Accepted(request_id=request_id, received_bytes=len(held.data),
                                                     committed=held.committed))


def _response(event: Any) -> Any:
    return pb.GenerateResponse(event=event)
