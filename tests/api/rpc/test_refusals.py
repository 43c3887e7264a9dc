"""What a client may send wrong: each has its status, its reason and its field, and leaves nothing behind."""

import contextlib
from collections.abc import Callable

import grpc
import pytest
from ringserve_api.errors import TABLE
from ringserve_api.rpc.upload import MAX_CHUNK

from ringserve.errors import OverloadedError
from ringserve.v1 import inference_pb2 as pb
from tests.api.conftest import RunningServer
from tests.api.rpc.calls import (
    Call,
    Refusal,
    Stub,
    check_nothing_left,
    chunk,
    commit,
    ids_open,
    refusal,
    resume,
    seconds,
    text_open,
    upload,
)

Messages = list[pb.GenerateRequest]
HELLO = b"hello\n"


def check(found: Refusal, reason: str, field: str | None) -> None:
    assert found.reason == reason, found
    assert found.code == grpc.StatusCode[TABLE[reason].grpc]
    assert found.field == field, found
    assert found.message


UPLOADS: dict[str, tuple[Messages, str, str | None]] = {
    "a chunk lost": ([text_open(), chunk(HELLO), chunk(HELLO, 12)], "invalid_value", "chunk.offset"),
    "a chunk repeated": ([text_open(), chunk(HELLO), chunk(HELLO)], "invalid_value", "chunk.offset"),
    "chunks in another order": ([text_open(), chunk(HELLO, 6), chunk(HELLO)], "invalid_value", "chunk.offset"),
    "an offset beyond all": ([text_open(), chunk(HELLO, 2**64 - 1)], "invalid_value", "chunk.offset"),
    "another checksum": ([text_open(), chunk(HELLO, crc32c=7)], "checksum_mismatch", "chunk.crc32c"),
    "a large chunk": ([text_open(), chunk(b"x" * (MAX_CHUNK + 1))], "request_too_large", "chunk.data"),
    "half an id": ([ids_open(), chunk(b"abcde")], "invalid_value", "chunk.data"),
    "no UTF-8": ([text_open(), chunk(b"ab\xff")], "invalid_value", "chunk.data"),
    "half a surrogate pair": ([text_open(), chunk(b"\xed\xa0\x80")], "invalid_value", "chunk.data"),
    "no UTF-8 over two chunks": ([text_open(), chunk(b"ab\xe2"), chunk(b"\x28", 3)], "invalid_value", "chunk.data"),
    "half a character at the end": ([text_open(), *upload(b"ab\xe2\x82")], "invalid_value", "chunk.data"),
    "another length": ([text_open(), chunk(HELLO), commit(HELLO, total_bytes=7)], "invalid_value",
                       "commit.total_bytes"),
    "another hash": ([text_open(), chunk(HELLO), commit(HELLO, sha256=bytes(32))], "checksum_mismatch",
                     "commit.sha256"),
    "no hash": ([text_open(), chunk(HELLO), commit(HELLO, sha256=b"")], "checksum_mismatch", "commit.sha256"),
    "no text": ([text_open(), commit(b"")], "invalid_value", "prompt"),
    "no ids": ([ids_open(), commit(b"")], "invalid_value", "prompt"),
    "only an empty chunk": ([text_open(), chunk(b""), commit(b"")], "invalid_value", "prompt"),
    "an id that is none": ([ids_open(), *upload(b"\xff\xff\xff\xff")], "invalid_value", "prompt"),
    "no Commit": ([text_open(), chunk(HELLO)], "body_idle_timeout", None),
    "no chunks": ([text_open()], "body_idle_timeout", None),
    "nothing at all": ([], "body_idle_timeout", None),
    "a second Open": ([text_open(), text_open()], "invalid_value", "message"),
    "a Resume after an Open": ([text_open(), resume("x")], "invalid_value", "message"),
    "an empty message": ([text_open(), pb.GenerateRequest()], "invalid_value", "message"),
    "a chunk first": ([chunk(HELLO)], "invalid_value", "message"),
    "a Commit first": ([commit(HELLO)], "invalid_value", "message"),
    "nothing first": ([pb.GenerateRequest()], "invalid_value", "message"),
    "more than the context, as it comes": (
        [ids_open(sampling=pb.Sampling(max_tokens=8 << 20)), chunk(b"a\0\0\0")], "context_length_exceeded", "prompt"),
}
OPENS: dict[str, tuple[pb.GenerateRequest, str, str | None]] = {
    "no kind": (text_open(prompt_kind=0), "invalid_value", "prompt_kind"),
    "a kind of the future": (text_open(prompt_kind=77), "invalid_value", "prompt_kind"),
    "no model": (text_open(model=""), "model_not_found", "model"),
    "another model": (text_open(model="pin"), "model_not_found", "model"),
    "too long, in tokens": (text_open(prompt_tokens=8 << 20), "context_length_exceeded", "prompt"),
    "too long, in bytes of ids": (ids_open(prompt_bytes=32 << 20), "context_length_exceeded", "prompt"),
    "too long, by far": (text_open(prompt_tokens=2**64 - 1), "context_length_exceeded", "prompt"),
    "too long an answer": (text_open(sampling=pb.Sampling(max_tokens=9 << 20)), "context_length_exceeded", "prompt"),
    "a name of other characters": (text_open(request_id="a/b"), "invalid_value", "request_id"),
    "a long name": (text_open(request_id="a" * 129), "invalid_value", "request_id"),
    "a negative keep": (text_open(keep=seconds(-1)), "invalid_value", "keep"),
    "a long keep": (text_open(keep=seconds(86401)), "invalid_value", "keep"),
    "a deadline of 0": (text_open(scheduling=pb.Scheduling(deadline=seconds(0))), "invalid_value", "deadline"),
    "a deadline in the past": (text_open(scheduling=pb.Scheduling(deadline=seconds(-3))), "invalid_value", "deadline"),
    "a deadline in another life": (
        text_open(scheduling=pb.Scheduling(deadline=seconds(8 * 86400))), "invalid_value", "deadline"),
    "a priority": (text_open(scheduling=pb.Scheduling(priority=-9)), "invalid_value", "priority"),
    "a salt": (text_open(scheduling=pb.Scheduling(cache_salt="x" * 257)), "invalid_value", "cache_salt"),
    **{f"sampling: {name}": (text_open(sampling=pb.Sampling(**{name: value})), "invalid_value", field)
       for name, value, field in (
           ("max_tokens", 0, "max_tokens"), ("max_tokens", 2**32 - 1, "max_tokens"), ("temperature", -1, "temperature"),
           ("temperature", float("nan"), "temperature"), ("top_p", float("inf"), "top_p"), ("top_p", 0, "top_p"),
           ("top_k", -2, "top_k"), ("min_p", 1.5, "min_p"), ("presence_penalty", 3, "presence_penalty"),
           ("repetition_penalty", 0, "repetition_penalty"), ("stop", ["a"] * 5, "stop"), ("stop", [""], "stop"),
           ("stop_token_ids", [258], "stop_token_ids"), ("logit_bias", {300: 1.0}, "logit_bias"),
           ("logit_bias", {3: float("nan")}, "logit_bias"), ("logprobs", 1000, "logprobs"))},
}


@pytest.mark.parametrize("case", UPLOADS)
def test_wrong_uploads(server: RunningServer, stub: Stub, case: str) -> None:
    messages, reason, field = UPLOADS[case]
    with Call(stub, *messages) as call:
        check(call.refusal(), reason, field)
        check_nothing_left(server)


@pytest.mark.parametrize("case", OPENS)
def test_wrong_opens(server: RunningServer, stub: Stub, case: str) -> None:
    message, reason, field = OPENS[case]
    with Call(stub, message) as call:
        check(call.refusal(), reason, field)
        assert call.seen == [] and server.engine.asked == []


@pytest.mark.parametrize("sent", [[], [text_open()], [text_open(), chunk(HELLO)]])
def test_a_stream_that_ends_without_a_commit(server: RunningServer, stub: Stub, sent: Messages) -> None:
    with Call(stub, *sent) as call:
        call.close()
        check(call.refusal(), "invalid_value", "message")
        check_nothing_left(server)


@pytest.mark.parametrize("extra", [chunk(HELLO, 6), commit(HELLO), text_open(), resume("x"), pb.GenerateRequest()])
def test_messages_after_the_commit(server: RunningServer, stub: Stub, extra: pb.GenerateRequest) -> None:
    server.engine.step_s = 60
    with Call(stub, text_open(), *upload(HELLO)) as call:
        call.until("prefill_progress")
        call.send(extra)
        check(call.refusal(), "invalid_value", "message")
        check_nothing_left(server)


def test_the_stream_may_end_after_the_commit(server: RunningServer, stub: Stub) -> None:
    server.engine.first_step_s = 0.2
    with Call(stub, text_open(), *upload(HELLO)) as call:
        call.close()
        assert call.rest()[-1].HasField("finished")


def test_a_message_too_large_for_grpc(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(), chunk(b"x" * (5 << 20))) as call:
        assert call.refusal().code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)
        check_nothing_left(server)


def test_numbers_of_events_that_never_were(server: RunningServer, stub: Stub) -> None:
    server.engine.step_s = 60
    with Call(stub, text_open(request_id="one"), *upload(HELLO)) as call:
        call.until("prefill_progress")
        check(refusal(stub.Attach(pb.AttachRequest(request_id="one", after_sequence=3), timeout=20)),
              "invalid_value", "after_sequence")
        with Call(stub, resume("one", 2**64 - 1)) as other:
            check(other.refusal(), "invalid_value", "after_sequence")


def test_a_wrong_resume_takes_no_upload_away(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(request_id="one"), chunk(HELLO)) as call:
        call.until("accepted")
        with Call(stub, resume("one", 9)) as other:
            check(other.refusal(), "invalid_value", "after_sequence")
        call.send(chunk(HELLO, 6), commit(HELLO * 2))
        assert call.rest()[-1].HasField("finished")


def test_a_name_that_is_taken(server: RunningServer, stub: Stub) -> None:
    with Call(stub, text_open(request_id="one")) as call:
        call.until("accepted")
        with Call(stub, text_open(request_id="one")) as other:
            check(other.refusal(), "idempotency_conflict", "request_id")
        call.send(*upload(HELLO))
        call.rest()


def test_a_long_message_reaches_its_client(server: RunningServer, stub: Stub) -> None:
    """Headers of more than 8 KiB do not."""
    stop_token_ids = [2**32 - 1] * 200
    request = pb.ChatRequest(model="needle", messages=[pb.ChatMessage(role="é" * 3000)] * 12,
                             sampling=pb.Sampling(stop_token_ids=stop_token_ids, temperature=-1, top_p=9, min_p=9))
    found = refusal(stub.Chat(request, timeout=20))
    assert found.reason == "invalid_value" and found.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_that_the_engine_refuses(server: RunningServer, stub: Stub) -> None:
    server.engine.refusal = OverloadedError("no room", retry_after_s=3)
    with Call(stub, text_open(), *upload(HELLO)) as call:
        found = call.refusal()
        check(found, "server_overloaded", None)
        assert found.retry_s == 3


def test_an_unexpected_failure_tells_nothing(server: RunningServer, stub: Stub) -> None:
    server.engine.broken = True
    with Call(stub, text_open(), *upload(HELLO)) as call:
        found = call.refusal()
        check(found, "internal_error", None)
        assert "secret" not in found.message


@pytest.mark.parametrize("reason", ["colour", None])
def test_a_finish_reason_that_nobody_knows_is_an_error(server: RunningServer, stub: Stub, reason: str | None) -> None:
    server.engine.finish_reason = reason
    with Call(stub, text_open(), *upload(HELLO)) as call:
        check(call.refusal(), "engine_error", None)
    server.engine.live.clear()


def test_too_many_bytes_in_flight(server: RunningServer, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = server.server.state.bodies
    monkeypatch.setattr(bodies, "_total_limit", 10)
    with Call(stub, text_open(), chunk(HELLO)) as call:
        call.until("accepted")
        with Call(stub, text_open(), chunk(HELLO)) as other:
            results: list[Callable[[], object]] = [call.refusal, other.refusal]
            found = [result for get in results for result in [get()]]
    assert {one.reason for one in found} == {"server_overloaded", "body_idle_timeout"}


def test_chunks_after_the_request_has_ended_hold_nothing(server: RunningServer, stub: Stub) -> None:
    """The client reads nothing, so that its call goes on."""
    with contextlib.ExitStack() as calls:
        call = calls.enter_context(Call(stub, text_open(request_id="one")))
        call.until("accepted")
        stub.Cancel(pb.CancelRequest(request_id="one"), timeout=20)
        call.send(*(chunk(HELLO, 6 * index) for index in range(50)))
        check_nothing_left(server)
