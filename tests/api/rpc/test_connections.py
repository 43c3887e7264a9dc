"""Connections that are lost, and clients that come back."""

import time
from collections.abc import Callable

import grpc
import pytest

from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer, eventually
from tests.api.rpc.calls import (
    TIMEOUT_S,
    Call,
    Stub,
    check_nothing_left,
    chunk,
    commit,
    ids_of,
    ids_open,
    kinds_of,
    leftovers,
    little,
    prompts,
    refusal,
    resume,
    seconds,
    text_of,
    text_open,
    upload,
)

LONG = pb.Sampling(max_tokens=1000)
TEXT = b"".join(b"line %d\n" % number for number in range(20_000))


def attach(stub: Stub, name: str, after: int = 0) -> list[pb.Event]:
    return [answer.event for answer in stub.Attach(pb.AttachRequest(request_id=name, after_sequence=after),
                                                   timeout=TIMEOUT_S)]


def detached(server: RunningServer) -> bool:
    """Everybody has gone, and the server knows."""
    rpc = server.server.rpc
    return rpc is not None and rpc.sessions is not None and not any(s.is_attached for s in rpc.sessions)


def cancel(stub: Stub, name: str) -> None:
    stub.Cancel(pb.CancelRequest(request_id=name), timeout=TIMEOUT_S)


def lost(stub: Stub, name: str) -> None:
    """Nobody finds it any more."""
    assert refusal(stub.Attach(pb.AttachRequest(request_id=name), timeout=TIMEOUT_S)).reason == "not_found"


@pytest.mark.parametrize("phase", ["upload", "early prefill", "prefill", "decode"])
def test_without_keep_a_lost_connection_cancels(server: RunningServer, stub: Stub, phase: str) -> None:
    server.engine.first_step_s = 60 if "prefill" in phase else 0
    server.engine.step_s = 0.01
    messages = {"upload": [chunk(b"abc")], "early prefill": [chunk(TEXT)]}.get(phase, upload(b"abc"))
    with Call(stub, text_open(sampling=LONG), *messages) as call:
        call.until({"upload": "accepted", "decode": "delta"}.get(phase, "prefill_progress"))
    check_nothing_left(server)
    assert len(server.engine.cancelled) == (phase != "upload")


def test_a_lost_upload_goes_on_where_it_was(server: RunningServer, stub: Stub) -> None:
    name = "one"
    for break_at in (0, 1, 100_001, 100_002, len(TEXT)):
        with Call(stub, text_open(request_id=name, keep=seconds(20))) as call:
            call.until("accepted")
            for at in range(0, break_at, 50_000):
                call.send(chunk(TEXT[at:min(at + 50_000, break_at)], at))
            eventually(lambda n=break_at: [s.upload.received for s in server.server.rpc.sessions] == [n])  # type: ignore
        eventually(lambda: detached(server))
        with Call(stub, resume(name, 1)) as call:
            event = next(iter(call))
            assert event.sequence == 1
            assert event.accepted == pb.Accepted(request_id=name, received_bytes=break_at)
            call.send(*upload(TEXT, 70_000, break_at))
            assert text_of(call.rest()) == "li"
        assert prompts(server)[-1] == list(TEXT)
        cancel(stub, name)


def test_uploads_survive_many_losses(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(request_id="one", keep=seconds(20))) as call:
        call.until("accepted")
    at = 0
    for number in range(40):
        with Call(stub, resume("one", 1)) as call:
            at = call.accepted.received_bytes
            call.send(chunk(TEXT[at:at + 3001], at))
            if number % 3:
                time.sleep(0.002 * (number % 5))
    with Call(stub, resume("one", 1)) as call:
        at = call.accepted.received_bytes
        call.send(*upload(TEXT, start=at))
        assert call.rest()[-1].HasField("finished")
    assert prompts(server) == [list(TEXT)]
    cancel(stub, "one")


def test_a_resumed_upload_is_not_ended_by_the_connection_before(server: RunningServer, stub: Stub) -> None:
    """Which is silent, but has not been found to be lost."""
    with Call(stub, text_open(request_id="one", keep=seconds(20)), chunk(b"ab")) as old, Call(stub) as new:
        eventually(lambda: [s.upload.received for s in server.server.rpc.sessions] == [2])  # type: ignore
        new.send(resume("one", 1))
        assert new.accepted.received_bytes == 2
        for at in range(6):  # longer than the server waits for a silent client
            time.sleep(0.15)
            new.send(chunk(b"c", 2 + at))
        new.send(commit(b"ab" + b"c" * 6))
        assert text_of(new.rest()) == "ab"
        assert text_of(old.rest()) == "ab"
    cancel(stub, "one")


def test_a_request_lives_through_a_loss_in_its_prefill(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 0.5
    with Call(stub, text_open(request_id="one", keep=seconds(20)), *upload(b"abc")) as call:
        call.until("prefill_progress")
    eventually(lambda: detached(server))
    assert server.engine.cancelled == []
    events = attach(stub, "one", 2)
    assert kinds_of(events) == ["prefill_progress", "delta", "delta", "finished"] and events[0].sequence == 2
    with Call(stub, resume("one", 2)) as call:
        assert call.accepted == pb.Accepted(request_id="one", received_bytes=3, committed=True)
        assert kinds_of(call.rest()) == ["delta", "delta", "finished"]
    cancel(stub, "one")


def test_an_answer_goes_on_without_gap_or_repeat(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 0.001
    opened = text_open(request_id="one", keep=seconds(20), sampling=pb.Sampling(max_tokens=300))
    with Call(stub, opened, *upload(bytes(range(97, 117)))) as call:
        events = [call.until("accepted"), call.until("estimated"), *(call.until("delta") for _ in range(5))]
    while not events[-1].HasField("finished"):
        answers = stub.Attach(pb.AttachRequest(request_id="one", after_sequence=events[-1].sequence),
                              timeout=TIMEOUT_S)
        for answer, _ in zip(answers, range(60)):
            events.append(answer.event)
        answers.cancel()
    assert [event.sequence for event in events] == list(range(1, 304))
    assert ids_of(events) == list(range(97, 117)) * 15
    assert ids_of(attach(stub, "one")) == ids_of(events)
    assert attach(stub, "one", 303) == []
    cancel(stub, "one")


def test_losses_at_any_time_do_not_end_it(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 0.002
    opened = text_open(request_id="one", keep=seconds(20), sampling=pb.Sampling(max_tokens=200))
    with Call(stub, opened, *upload(b"abc")) as call:
        seen = call.until("delta").sequence
    for _ in range(40):
        with Call(stub, resume("one", seen)) as call:
            seen = max(seen, call.until("delta").sequence)
    events = attach(stub, "one", seen)
    assert events[-1].HasField("finished") and events[-1].sequence == 203
    cancel(stub, "one")


def test_what_is_kept_is_kept_no_longer(server: RunningServer, stub: Stub) -> None:
    for messages in ([chunk(TEXT)], upload(b"abc")):
        server.engine.first_step_s = 60
        with Call(stub, text_open(request_id="one", keep=seconds(0.4)), *messages) as call:
            call.until("prefill_progress")
        eventually(lambda: detached(server))
        assert "sessions" in leftovers(server)
        check_nothing_left(server)
        lost(stub, "one")
    assert len(server.engine.cancelled) == 2


def test_who_comes_back_stops_the_clock(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 1.0
    with Call(stub, text_open(request_id="one", keep=seconds(0.5)), *upload(b"abc")) as call:
        call.until("prefill_progress")
    eventually(lambda: detached(server))
    time.sleep(0.2)
    assert text_of(attach(stub, "one")) == "ab"
    time.sleep(0.2)
    assert text_of(attach(stub, "one")) == "ab"
    check_nothing_left(server)


def test_two_may_read_at_a_time(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 0.01
    with Call(stub, text_open(request_id="one", sampling=pb.Sampling(max_tokens=20)), *upload(b"abc")) as call:
        call.until("delta")
        readers = [stub.Attach(pb.AttachRequest(request_id="one"), timeout=TIMEOUT_S) for _ in range(2)]
        texts = [text_of([answer.event for answer in reader]) for reader in readers]
        first = call.rest()
    assert texts == ["abcabcabcabcabcabcab"] * 2 and first[-1].HasField("finished")


def test_it_lives_while_anybody_reads(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 0.02
    with Call(stub, text_open(request_id="one", sampling=pb.Sampling(max_tokens=30)), *upload(b"abc")) as call:
        call.until("delta")
        reader = stub.Attach(pb.AttachRequest(request_id="one"), timeout=TIMEOUT_S)
        next(reader)
    assert [answer.event for answer in reader][-1].HasField("finished")
    assert server.engine.cancelled == []


@pytest.mark.parametrize("phase", ["upload", "prefill", "decode", "finished"])
def test_cancel_while_nobody_is_there(server: RunningServer, stub: Stub, phase: str) -> None:
    server.engine.first_step_s = 60 if phase == "prefill" else 0
    server.engine.step_s = 60 if phase == "decode" else 0
    with Call(stub, text_open(request_id="one", keep=seconds(3600)),
              *([chunk(b"a")] if phase == "upload" else upload(b"abc"))) as call:
        call.until({"upload": "accepted", "finished": "finished"}.get(phase, "prefill_progress"))
    eventually(lambda: detached(server))
    cancel(stub, "one")
    check_nothing_left(server)
    lost(stub, "one")
    assert refusal(lambda: cancel(stub, "one")).reason == "not_found"


def test_cancel_while_somebody_reads(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    with Call(stub, text_open(request_id="one", keep=seconds(3600)), *upload(b"abc")) as call:
        call.until("prefill_progress")
        sessions = server.server.rpc.sessions  # type: ignore[union-attr]
        assert sessions is not None
        (session,) = sessions
        cancel(stub, "one")
        found = call.refusal()
        assert found.reason == "cancelled" and found.code == grpc.StatusCode.CANCELLED
    eventually(lambda: not session.is_attached)
    assert session._timer is None or session._timer.cancelled()
    eventually(lambda: len(server.engine.cancelled) == 1)


def test_the_name_is_free_afterwards(server: RunningServer, stub: Stub) -> None:
    for _ in range(3):
        with Call(stub, text_open(request_id="one", keep=seconds(20)), *upload(b"abc")) as call:
            call.rest()
        cancel(stub, "one")


def test_a_conversation_can_be_come_back_to_but_not_resumed(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 0.3
    request = pb.ChatRequest(model="needle", messages=[pb.ChatMessage(role="user", content="hi")], request_id="one",
                             sampling=pb.Sampling(max_tokens=3), keep=seconds(20))
    call = stub.Chat(request, timeout=TIMEOUT_S)
    next(call)
    call.cancel()
    eventually(lambda: detached(server))
    assert text_of(attach(stub, "one")) == "<us"
    with Call(stub, resume("one")) as resumed:
        found = resumed.refusal()
        assert found.reason == "invalid_value" and found.field == "request_id"
    cancel(stub, "one")


@pytest.fixture
def shared(start_server: Callable[..., RunningServer]) -> RunningServer:
    return start_server(grpc_port=0, tenant_header="x-tenant")


def test_other_tenants_find_nothing(shared: RunningServer) -> None:
    from ringserve.v1 import inference_pb2_grpc
    shared.engine.step_s = 60
    ours, theirs = [("x-tenant", "ours")], [("x-tenant", "theirs")]
    assert shared.server.rpc is not None
    with grpc.insecure_channel(shared.server.rpc.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with Call(stub, ids_open(request_id="one", keep=seconds(60)), *upload(little([1, 2])), metadata=ours) as call:
            call.until("prefill_progress")
            assert shared.engine.scheduled[0].tenant == "ours"
            for other in (theirs, []):
                for result in (
                        refusal(stub.Attach(pb.AttachRequest(request_id="one"), metadata=other, timeout=TIMEOUT_S)),
                        refusal(lambda who=other: stub.Cancel(pb.CancelRequest(request_id="one"), metadata=who,
                                                              timeout=TIMEOUT_S))):
                    assert (result.code.name, result.reason, result.field) == ("NOT_FOUND", "not_found", "request_id")
                with Call(stub, resume("one"), metadata=other) as intruder:
                    assert intruder.refusal().reason == "not_found"
            with Call(stub, text_open(request_id="one"), metadata=theirs) as same_name:
                same_name.until("accepted")
            assert shared.engine.cancelled == []
            with Call(stub, text_open(), metadata=[*ours, *theirs]) as two:
                found = two.refusal()
                assert found.reason == "invalid_value" and found.field == "x-tenant"
        stub.Cancel(pb.CancelRequest(request_id="one"), metadata=ours, timeout=TIMEOUT_S)
    check_nothing_left(shared)


def test_a_client_that_may_be_gone_for_a_while_may_be_silent_for_as_long(server: RunningServer, stub: Stub) -> None:
    """Its connection may be dead without anybody's noticing: what was sent must still be there when it comes back."""
    with Call(stub, text_open(request_id="one", keep=seconds(20)), chunk(b"ab")) as old:
        time.sleep(1.0)  # longer than the server waits for a silent client that is not kept
        with Call(stub, resume("one", 1), chunk(b"c", 2), commit(b"abc")) as new:
            assert text_of(new.rest()) == "ab"
        assert text_of(old.rest()) == "ab"
    cancel(stub, "one")


def test_who_took_over_and_went_leaves_no_one_waiting(server: RunningServer, stub: Stub) -> None:
    """The connection before still reads, but brings nothing any more."""
    with Call(stub, text_open(request_id="one", keep=seconds(0.5)), chunk(b"ab")) as old:
        eventually(lambda: [s.upload.received for s in server.server.rpc.sessions] == [2])  # type: ignore
        with Call(stub, resume("one", 1)) as new:
            assert new.accepted.received_bytes == 2
        assert old.refusal().reason == "body_idle_timeout"
