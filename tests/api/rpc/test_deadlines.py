"""Deadlines: of a request, and of a call."""

import time

import grpc
import pytest

from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer, eventually
from tests.api.rpc.calls import (
    TIMEOUT_S,
    Call,
    Refusal,
    Stub,
    check_nothing_left,
    chunk,
    ids_open,
    kinds_of,
    refusal,
    seconds,
    text_open,
    upload,
)


def within(value: float) -> pb.Scheduling:
    return pb.Scheduling(deadline=seconds(value))


def check(found: Refusal) -> None:
    assert found.reason == "deadline_exceeded" and found.code is grpc.StatusCode.DEADLINE_EXCEEDED, found


def test_what_cannot_begin_in_time_is_refused(server: RunningServer, stub: Stub) -> None:
    server.engine.first_token_ms = 5000
    with Call(stub, text_open(scheduling=within(2)), *upload(b"abc")) as call:
        check(call.refusal())
        assert kinds_of(call.seen)[-1] in ("accepted", "prefill_progress")
    with Call(stub, ids_open(scheduling=within(2), prompt_tokens=7)) as call:  # before the prompt came
        check(call.refusal())
    request = pb.ChatRequest(model="needle", messages=[pb.ChatMessage(role="user", content="hi")],
                             scheduling=within(2))
    check(refusal(stub.Chat(request, timeout=TIMEOUT_S)))
    text = pb.GenerateTextRequest(model="needle", text="abc", scheduling=within(2))
    check(refusal(lambda: stub.GenerateText(text, timeout=TIMEOUT_S)))


def test_what_begins_in_time_is_not(server: RunningServer, stub: Stub) -> None:
    server.engine.first_token_ms = 2000
    with Call(stub, text_open(scheduling=within(8), prompt_tokens=3), *upload(b"abc")) as call:
        assert call.rest()[-1].HasField("finished")


@pytest.mark.parametrize("keep", [0, 60])
@pytest.mark.parametrize("phase", ["upload", "prefill", "decode"])
def test_what_does_not_end_in_time_is_cancelled(server: RunningServer, stub: Stub, phase: str, keep: float) -> None:
    server.engine.first_step_s = 60 if phase == "prefill" else 0
    server.engine.step_s = 0.01
    opened = text_open(scheduling=within(0.4), keep=seconds(keep), request_id="one", sampling=pb.Sampling())
    with Call(stub, opened, *([chunk(b"a")] if phase == "upload" else upload(b"abc"))) as call:
        began = time.monotonic()
        check(call.refusal())
        assert time.monotonic() - began < 3
    if keep:
        check(refusal(stub.Attach(pb.AttachRequest(request_id="one", after_sequence=1), timeout=TIMEOUT_S)))
        stub.Cancel(pb.CancelRequest(request_id="one"), timeout=TIMEOUT_S)
    check_nothing_left(server)


def test_a_text_at_once_is_cancelled_too(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    check(refusal(lambda: stub.GenerateText(
        pb.GenerateTextRequest(model="needle", text="abc", scheduling=within(0.3)), timeout=TIMEOUT_S)))
    assert len(server.engine.cancelled) == 1


def test_the_deadline_of_the_call_is_the_requests(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    for _ in range(5):
        with Call(stub, text_open(), *upload(b"abc"), timeout=0.3) as call:
            assert call.refusal().code is grpc.StatusCode.DEADLINE_EXCEEDED
        check_nothing_left(server)
    assert len(server.engine.cancelled) == 5


def test_but_not_of_one_that_is_kept(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 0.6
    with Call(stub, text_open(request_id="one", keep=seconds(20)), *upload(b"abc"), timeout=0.3) as call:
        assert call.refusal().code is grpc.StatusCode.DEADLINE_EXCEEDED
    events = list(stub.Attach(pb.AttachRequest(request_id="one"), timeout=TIMEOUT_S))
    assert events[-1].event.HasField("finished") and server.engine.cancelled == []
    stub.Cancel(pb.CancelRequest(request_id="one"), timeout=TIMEOUT_S)


def test_the_estimate_of_a_call_counts_too(server: RunningServer, stub: Stub) -> None:
    server.engine.first_token_ms = 60_000
    with Call(stub, text_open(), *upload(b"abc"), timeout=5) as call:
        check(call.refusal())
    eventually(lambda: not server.engine.live)
