"""The server's end, seen over gRPC: drains, time-outs, the engine's death."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ringserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer, eventually
from tests.api.rpc.calls import (
    TIMEOUT_S,
    Call,
    Refusal,
    Stub,
    chunk,
    commit,
    leftovers,
    refusal,
    resume,
    seconds,
    text_of,
    text_open,
    upload,
)

Start = Callable[..., RunningServer]


@contextmanager
def stub_of(server: RunningServer) -> Iterator[Stub]:
    assert server.server.rpc is not None
    with grpc.insecure_channel(server.server.rpc.target) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def check_draining(found: Refusal) -> None:
    assert found.code is grpc.StatusCode.UNAVAILABLE and found.reason == "draining", found
    assert found.retry_s is not None and 1 <= found.retry_s <= 30


def drain(server: RunningServer) -> None:
    assert server.server.rpc is not None
    with grpc.insecure_channel(server.server.rpc.admin_target) as channel:
        control_pb2_grpc.ControlServiceStub(channel).Drain(control_pb2.DrainRequest(), timeout=TIMEOUT_S)


def test_a_drain_lets_open_requests_finish(start_server: Start) -> None:
    server = start_server(grpc_port=0, grpc_admin_port=0)
    server.engine.step_s = 0.02
    assert server.server.rpc is not None
    with stub_of(server) as stub, grpc.insecure_channel(server.server.rpc.target) as channel, \
            Call(stub, text_open(request_id="one", sampling=pb.Sampling(max_tokens=50)), chunk(b"ab")) as call, \
            Call(stub, text_open(sampling=pb.Sampling(max_tokens=50)), *upload(b"xyz")) as other:
        call.until("accepted")
        other.until("delta")
        drain(server)
        drain(server)  # a client that tries again is no impatient operator
        eventually(lambda: server.server.state.draining)
        drain(server)
        with Call(stub, text_open()) as late:
            check_draining(late.refusal())
        short = {stub.GenerateText: pb.GenerateTextRequest(model="needle", text="a"),
                 stub.Estimate: pb.EstimateRequest(model="needle", text="a"),
                 stub.Tokenize: pb.TokenizeRequest(model="needle", text="a")}
        for method, request in short.items():
            check_draining(refusal(lambda m=method, r=request: m(r, timeout=TIMEOUT_S)))
        check_draining(refusal(stub.Chat(pb.ChatRequest(
            model="needle", messages=[pb.ChatMessage(role="user", content="hi")]), timeout=TIMEOUT_S)))
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == (
            health_pb2.HealthCheckResponse.NOT_SERVING)
        call.send(chunk(b"c", 2), commit(b"abc"))
        assert text_of(call.rest()).startswith("abc") and call.seen[-1].HasField("finished")
        assert other.rest()[-1].HasField("finished")
    assert server.join() == 0
    assert server.engine.cancelled == [] and server.engine.closed


def test_a_request_that_is_kept_can_be_come_back_to_in_a_drain(start_server: Start) -> None:
    server = start_server(grpc_port=0, grpc_admin_port=0)
    server.engine.step_s = 0.02
    with stub_of(server) as stub:
        opened = text_open(request_id="one", sampling=pb.Sampling(max_tokens=60), keep=seconds(60))
        with Call(stub, opened, *upload(b"abc")) as call:
            call.until("delta")
        drain(server)
        eventually(lambda: server.server.state.draining)
        with Call(stub, resume("one")) as call:
            assert call.rest()[-1].HasField("finished")
    assert server.join() == 0


@pytest.mark.parametrize("phase", ["upload", "prefill", "decode", "detached"])
def test_what_outlasts_the_drain_ends_with_it(start_server: Start, phase: str) -> None:
    server = start_server(grpc_port=0, drain_timeout_s=0.3)
    server.engine.first_step_s = 60 if phase == "prefill" else 0
    server.engine.step_s = 0.05
    opened = text_open(request_id="one", sampling=pb.Sampling(max_tokens=1000), keep=seconds(3600))
    with stub_of(server) as stub, Call(stub, opened, *([chunk(b"a")] if phase == "upload" else upload(b"abc"))) as call:
        call.until({"upload": "accepted", "prefill": "prefill_progress"}.get(phase, "delta"))
        if phase == "detached":
            call.drop()
        began = time.monotonic()
        server.server.shut_down()
        if phase != "detached":
            found = call.refusal()
            assert found.code is grpc.StatusCode.UNAVAILABLE and found.reason == "draining"
        assert server.join() == 0
        assert time.monotonic() - began < 8
    assert server.engine.live == set()


def test_a_reader_that_stalls_does_not_hold_up_the_end_for_long(start_server: Start) -> None:
    server = start_server(grpc_port=0, drain_timeout_s=0.3)
    with stub_of(server) as stub:
        stalled = stub.Generate(iter([text_open(sampling=pb.Sampling(max_tokens=20_000)), *upload(b"abc")]), timeout=60)
        next(stalled)
        eventually(lambda: server.engine.submitted and not server.engine.live, 30)
        server.server.shut_down()
        assert server.join() == 0
        stalled.cancel()


@pytest.mark.parametrize("phase", ["upload", "early prefill", "prefill", "decode"])
def test_the_engine_dies(start_server: Start, phase: str, capfd: pytest.CaptureFixture[str]) -> None:
    server = start_server(grpc_port=0)
    server.engine.first_step_s = 60 if "prefill" in phase else 0
    server.engine.step_s = 0.05
    messages = {"upload": [chunk(b"a")], "early prefill": [chunk(b"line\n" * 20_000)]}.get(phase, upload(b"abc"))
    with stub_of(server) as stub, Call(stub, text_open(sampling=pb.Sampling(max_tokens=1000)), *messages) as call:
        call.until({"upload": "accepted", "decode": "delta"}.get(phase, "prefill_progress"))
        server.engine.die(1)
        found = call.refusal()
        assert found.code is grpc.StatusCode.UNAVAILABLE and found.reason == "engine_dead"
        assert "secret" not in found.message
        assert server.join() == 1


def test_a_second_signal_ends_it_at_once(start_server: Start) -> None:
    server = start_server(grpc_port=0)
    server.engine.step_s = 60
    with stub_of(server) as stub, Call(stub, text_open(), *upload(b"abc")) as call:
        call.until("prefill_progress")
        began = time.monotonic()
        server.server.shut_down()
        server.server.shut_down(130)
        assert call.refusal().code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.join() == 130
        assert time.monotonic() - began < 5
    assert leftovers(server).keys() <= {"bytes in flight"}
