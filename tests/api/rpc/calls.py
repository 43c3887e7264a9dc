"""A client of the gRPC API that can do everything wrong, and what must be true after whatever it did."""

import asyncio
import hashlib
import queue
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from ringserve.v1 import inference_pb2 as pb
from ringserve.v1 import inference_pb2_grpc
from tests.api.conftest import RunningServer, eventually

TIMEOUT_S = 10
OURS = ("Session.", "EarlyPrefill.", "Inference.", "Upload.", "Generation.", "_unless_stopped")
Stub = inference_pb2_grpc.InferenceServiceStub
Metadata = Sequence[tuple[str, str]]


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1e9))


def text_open(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(open=pb.Open(**{
        "model": "needle", "prompt_kind": pb.PROMPT_KIND_TEXT, "sampling": pb.Sampling(max_tokens=2), **fields}))


def ids_open(**fields: Any) -> pb.GenerateRequest:
    return text_open(**{"prompt_kind": pb.PROMPT_KIND_TOKEN_IDS, **fields})


def resume(request_id: str, after: int = 0) -> pb.GenerateRequest:
    return pb.GenerateRequest(resume=pb.Resume(request_id=request_id, after_sequence=after))


def chunk(data: bytes, offset: int = 0, **wrong: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(chunk=pb.PromptChunk(**{
        "offset": offset, "data": data, "crc32c": google_crc32c.value(data), **wrong}))


def commit(data: bytes, **wrong: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(commit=pb.Commit(**{
        "total_bytes": len(data), "sha256": hashlib.sha256(data).digest(), **wrong}))


def upload(data: bytes, size: int = 1 << 20, start: int = 0) -> list[pb.GenerateRequest]:
    """The prompt in chunks, and its Commit."""
    return [*(chunk(data[at:at + size], at) for at in range(start, len(data), size)), commit(data)]


def little(ids: Sequence[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in ids) if len(ids) < 1000 else array("I", ids).tobytes()


@dataclass(frozen=True)
class Refusal:
    """How a call ended."""

    code: grpc.StatusCode
    message: str
    reason: str | None
    field: str | None
    retry_s: int | None

    @classmethod
    def of(cls, error: Any) -> "Refusal":
        status = rpc_status.from_call(error)
        reason = field = retry_s = None
        for detail in status.details if status is not None else []:
            for kind in (ErrorInfo, BadRequest, RetryInfo):
                if detail.Is(kind.DESCRIPTOR):
                    found = kind()
                    detail.Unpack(found)
                    if isinstance(found, ErrorInfo):
                        assert found.domain == "ringserve"
                        reason = found.reason
                    elif isinstance(found, BadRequest):
                        field = found.field_violations[0].field
                    else:
                        retry_s = found.retry_delay.seconds
        return cls(error.code(), error.details() or "", reason, field, retry_s)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.code.name, self.reason, self.field))


def refusal(call: Any) -> Refusal:
    """Of a call that must not end well: a function, or what iterates over events."""
    try:
        if callable(call):
            call()
        else:
            list(call)
    except grpc.RpcError as error:
        return Refusal.of(error)
    raise AssertionError("it went well")


class Call:
    """One Generate. Leaving the block drops the connection, if it is still there."""

    def __init__(self, stub: Stub, *messages: pb.GenerateRequest, metadata: Metadata = (),
                 timeout: float | None = TIMEOUT_S) -> None:
        self._messages: queue.SimpleQueue[pb.GenerateRequest | None] = queue.SimpleQueue()
        self.seen: list[pb.Event] = []
        self.send(*messages)
        self._call = stub.Generate(iter(self._messages.get, None), metadata=metadata, timeout=timeout)

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def send(self, *messages: pb.GenerateRequest) -> "Call":
        for message in messages:
            self._messages.put(message)
        return self

    def close(self) -> None:
        """Say that no more messages come."""
        self._messages.put(None)

    def drop(self) -> None:
        self._call.cancel()
        self.close()

    def __iter__(self) -> Iterator[pb.Event]:
        for response in self._call:
            self.seen.append(response.event)
            yield response.event

    def until(self, kind: str) -> pb.Event:
        return next(event for event in self if event.WhichOneof("kind") == kind)

    def rest(self) -> list[pb.Event]:
        return list(self)

    def refusal(self) -> Refusal:
        return refusal(self)

    @property
    def accepted(self) -> pb.Accepted:
        return self.until("accepted").accepted


def text_of(events: Sequence[pb.Event]) -> str:
    return "".join(event.delta.text for event in events)


def ids_of(events: Sequence[pb.Event]) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


def kinds_of(events: Sequence[pb.Event]) -> list[str | None]:
    return [event.WhichOneof("kind") for event in events]


def prompts(server: RunningServer) -> list[list[int]]:
    """Of the requests proper, without those that prefill what has come so far."""
    return [ids for name, ids, _ in server.engine.submitted if name.count("-") == 1]


def check_nothing_left(server: RunningServer) -> None:
    """No request, of which nothing is held and nothing runs, here or in the engine."""
    eventually(lambda: leftovers(server) == {})


def leftovers(server: RunningServer) -> dict[str, object]:
    running, state = server.server, server.server.state
    sessions = running.rpc.sessions if running.rpc is not None else None
    found: dict[str, object] = {
        "sessions": list(sessions or []), "open requests": state.open_requests,
        "bytes in flight": state.bodies._in_flight, "engine": server.engine.live,
        "tasks": [name for task in asyncio.all_tasks(running._loop)
                  if (name := task.get_coro().__qualname__).startswith(OURS)]}  # type: ignore[union-attr]
    return {name: value for name, value in found.items() if value}
