"""The short calls, conversations, the operators' service, health and reflection."""

import threading
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ringserve.v1 import control_pb2, control_pb2_grpc
from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer, eventually
from tests.api.rpc.calls import (
    TIMEOUT_S,
    Call,
    Stub,
    check_nothing_left,
    chunk,
    kinds_of,
    refusal,
    seconds,
    text_of,
    text_open,
    upload,
)

Control = control_pb2_grpc.ControlServiceStub
HI = [pb.ChatMessage(role="user", content="hi")]
AS_IDS = list(b"<user>hi\n<assistant>")
TWO = pb.Sampling(max_tokens=2)
SERVICES = {"ringserve.v1.InferenceService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


@pytest.mark.parametrize("prompt", [{"text": "abc"}, {"token_ids": pb.TokenIds(ids=[97, 98, 99])}])
def test_a_text_at_once(server: RunningServer, stub: Stub, prompt: dict[str, Any]) -> None:
    answer = stub.GenerateText(pb.GenerateTextRequest(
        model="needle", sampling=pb.Sampling(max_tokens=4, logprobs=1), **prompt), timeout=TIMEOUT_S)
    assert answer.text == "abca" and list(answer.token_ids) == [97, 98, 99, 97] and len(answer.logprobs) == 4
    assert answer.finished.usage.prompt_tokens == 3 and answer.request_id == server.engine.submitted[0][0]
    assert server.engine.submitted[0][1] == [97, 98, 99]


@pytest.mark.parametrize("request_, field", [
    (pb.GenerateTextRequest(model="needle"), "prompt"), (pb.GenerateTextRequest(model="needle", text=""), "prompt"),
    (pb.GenerateTextRequest(model="needle", token_ids=pb.TokenIds()), "prompt"),
    (pb.GenerateTextRequest(text="abc"), "model")])
def test_no_text_at_once(server: RunningServer, stub: Stub, request_: pb.GenerateTextRequest, field: str) -> None:
    assert refusal(lambda: stub.GenerateText(request_, timeout=TIMEOUT_S)).field == field


def test_a_text_at_once_ends_with_its_caller(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    call = stub.GenerateText.future(pb.GenerateTextRequest(model="needle", text="abc"), timeout=TIMEOUT_S)
    eventually(lambda: server.engine.submitted)
    assert server.engine.submitted[0][2].max_tokens is None
    call.cancel()
    check_nothing_left(server)
    assert len(server.engine.cancelled) == 1


def test_a_conversation(server: RunningServer, stub: Stub) -> None:
    events = [answer.event for answer in stub.Chat(
        pb.ChatRequest(model="needle", messages=HI, sampling=pb.Sampling(max_tokens=6, logprobs=2)),
        timeout=TIMEOUT_S)]
    assert kinds_of(events)[0] == "accepted" and events[0].accepted.committed
    assert text_of(events) == "<user>" and events[-1].HasField("finished")
    assert server.engine.submitted[0][1] == AS_IDS and server.engine.submitted[0][2].logprobs == 2


def test_no_conversation(server: RunningServer, stub: Stub) -> None:
    for request, field in ((pb.ChatRequest(model="needle"), "messages"),
                           (pb.ChatRequest(model="needle", messages=[pb.ChatMessage(role="x")]), "messages[0].role"),
                           (pb.ChatRequest(model="needle", messages=HI, keep=seconds(-1)), "keep"),
                           (pb.ChatRequest(model="needle", messages=HI, request_id="?"), "request_id")):
        found = refusal(stub.Chat(request, timeout=TIMEOUT_S))
        assert found.code == grpc.StatusCode.INVALID_ARGUMENT and (found.field or "").startswith(field), found


@pytest.mark.parametrize("prompt, ids", [
    ({"text": "abc"}, list(b"abc")), ({"token_ids": pb.TokenIds(ids=[1, 2])}, [1, 2]), ({"prompt_tokens": 5}, [0] * 5),
    ({"prompt_tokens": (8 << 20) - 2}, None), ({"conversation": pb.Conversation(messages=HI)}, AS_IDS)])
def test_an_estimate(server: RunningServer, stub: Stub, prompt: dict[str, Any], ids: list[int] | None) -> None:
    answer = stub.Estimate(pb.EstimateRequest(model="needle", **prompt), timeout=TIMEOUT_S)
    assert answer.estimated.first_token_ms == 7 and server.engine.submitted == []
    assert ids is None or server.engine.estimated == [ids]
    assert answer.estimated.prompt_tokens == len(server.engine.estimated[0])


def test_no_estimate(server: RunningServer, stub: Stub) -> None:
    for prompt, reason in (({}, "invalid_value"), ({"prompt_tokens": 0}, "invalid_value"),
                           ({"prompt_tokens": 2**64 - 1}, "context_length_exceeded")):
        assert refusal(lambda which=prompt: stub.Estimate(
            pb.EstimateRequest(model="needle", **which), timeout=TIMEOUT_S)).reason == reason


def test_ids_of_a_text(server: RunningServer, stub: Stub) -> None:
    request = pb.TokenizeRequest(model="needle", text="é")
    assert list(stub.Tokenize(request, timeout=TIMEOUT_S).token_ids) == [0xC3, 0xA9]
    request = pb.TokenizeRequest(model="needle", conversation=pb.Conversation(messages=HI))
    assert list(stub.Tokenize(request, timeout=TIMEOUT_S).token_ids) == AS_IDS
    assert refusal(lambda: stub.Tokenize(pb.TokenizeRequest(model="needle"), timeout=TIMEOUT_S)).field == "prompt"


def test_models(server: RunningServer, stub: Stub) -> None:
    assert list(stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models) == [
        pb.Model(name="needle", max_tokens=8 << 20, ring_size=2, server_version="0.1.0")]


def test_health(server: RunningServer, channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "ringserve.v1.InferenceService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=name),
                            timeout=TIMEOUT_S).status == health_pb2.HealthCheckResponse.SERVING
    assert refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service="x"),
                                        timeout=TIMEOUT_S)).code == grpc.StatusCode.NOT_FOUND


def test_reflection(server: RunningServer, channel: grpc.Channel) -> None:
    def ask(**request: Any) -> Any:
        return next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=TIMEOUT_S)))
    assert {service.name for service in ask(list_services="").list_services_response.service} == SERVICES
    found = ask(file_containing_symbol="ringserve.v1.InferenceService").file_descriptor_response
    assert FileDescriptorProto.FromString(found.file_descriptor_proto[0]).package == "ringserve.v1"


def test_control_is_not_for_the_public(server: RunningServer, channel: grpc.Channel, control: Control) -> None:
    status = control_pb2.GetStatusRequest()
    assert refusal(lambda: Control(channel).GetStatus(status, timeout=TIMEOUT_S)).code is (
        grpc.StatusCode.UNIMPLEMENTED)
    answer = control.GetStatus(status, timeout=TIMEOUT_S)
    assert (answer.model, answer.version, answer.ring_size, answer.draining) == ("needle", "0.1.0", 2, False)


def test_control_lists_and_cancels(server: RunningServer, stub: Stub, control: Control) -> None:
    server.engine.step_s = 60
    with Call(stub, text_open(request_id="going up"[:5]), chunk(b"abc")) as first, \
            Call(stub, text_open(request_id="done", keep=seconds(60)), *upload(b"abc")) as second:
        first.until("accepted")
        second.until("prefill_progress")
        eventually(lambda: sum(r.received_bytes for r in control.ListRequests(
            control_pb2.ListRequestsRequest(), timeout=TIMEOUT_S).requests) == 6)
        listed = control.ListRequests(control_pb2.ListRequestsRequest(), timeout=TIMEOUT_S).requests
        assert [(r.request_id, r.phase, r.attached) for r in listed] == [
            ("going", control_pb2.REQUEST_PHASE_UPLOAD, True), ("done", control_pb2.REQUEST_PHASE_PREFILL, True)]
        assert control.GetStatus(control_pb2.GetStatusRequest(), timeout=TIMEOUT_S).open_requests == 2
        for name in ("going", "done"):
            control.CancelRequest(control_pb2.CancelRequestRequest(request_id=name), timeout=TIMEOUT_S)
        assert first.refusal().reason == second.refusal().reason == "cancelled"
    found = refusal(lambda: control.CancelRequest(control_pb2.CancelRequestRequest(request_id="done"),
                                                  timeout=TIMEOUT_S))
    assert (found.reason, found.field) == ("not_found", "request_id")


def test_a_reader_that_stalls_holds_up_nobody(server: RunningServer, stub: Stub) -> None:
    big = pb.Sampling(max_tokens=20_000)
    stalled = stub.Generate(iter([text_open(request_id="slow", sampling=big), *upload(b"abc")]), timeout=60)
    next(stalled)
    for _ in range(3):
        with Call(stub, text_open(), *upload(b"xyz")) as call:
            assert text_of(call.rest()) == "xy"
    eventually(lambda: server.engine.live == set(), 30)  # it was computed, although nobody reads
    assert sum(len(answer.event.delta.token_ids) for answer in stalled) == 20_000


def test_many_at_a_time(server: RunningServer, stub: Stub) -> None:
    texts: list[str] = []

    def ask(number: int) -> None:
        with Call(stub, text_open(sampling=pb.Sampling(max_tokens=5)), *upload(b"%05d" % number, 2)) as call:
            texts.append(text_of(call.rest()))
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert sorted(texts) == [f"{number:05d}" for number in range(40)]
