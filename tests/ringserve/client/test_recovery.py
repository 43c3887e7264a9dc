"""A connection that breaks, at each place of a request's way: nothing is lost, nothing comes twice."""

import asyncio
import contextlib
import time
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import pytest

from ringserve.client import Accepted, AsyncClient, Client, ClientError, ConnectionLostError, Delta, Event, Finished
from ringserve.client.upload import CHUNK_BYTES
from tests.ringserve.client.fake_service import DELTAS, FakeService, Fault, refuse
from tests.ringserve.client.tcp_proxy import TcpProxy

TIMEOUT_S = 20.0
TEXT = "a€" * CHUNK_BYTES  # four chunks

PLACES: dict[str, tuple[Fault, list[str]]] = {
    "before the open was taken": (Fault("open"), ["generate", "resume", "generate"]),
    "at the open": (Fault("accepted"), ["generate", "resume"]),
    "in the upload": (Fault("chunk", 2), ["generate", "resume"]),
    "at the last chunk": (Fault("chunk", 4), ["generate", "resume"]),
    "before the commit was taken": (Fault("commit"), ["generate", "resume"]),
    "before the commit was acknowledged": (Fault("committed"), ["generate", "resume"]),
    "in the prefill": (Fault("prefill"), ["generate", "resume"]),
    "in the decode": (Fault("delta", 5), ["generate", "attach"]),
    "after the last delta": (Fault("delta", DELTAS), ["generate", "attach"]),
}


def check(events: list[Event], service: FakeService, prompt: bytes) -> None:
    """Each event once, in order; the prompt went up once."""
    assert service.only.data == prompt
    sizes = [size for _, size in service.only.chunks]
    assert [offset for offset, _ in service.only.chunks] == [sum(sizes[:n]) for n in range(len(sizes))]
    deltas = [event for event in events if isinstance(event, Delta)]
    assert "".join(delta.text for delta in deltas) == sha256(prompt).hexdigest()
    assert [delta.token_ids for delta in deltas] == [(n,) for n in range(DELTAS)]
    assert sum(isinstance(event, Accepted) for event in events) == 1
    assert isinstance(events[-1], Finished)
    assert not service.cancelled


async def collect(target: str, prompt: Any, **settings: Any) -> list[Event]:
    async with AsyncClient(target, **settings) as client:
        return [event async for event in client.generate(prompt)]


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


@pytest.mark.parametrize("place", PLACES)
def test_a_stream_that_the_server_drops(place: str, service: FakeService, target: str) -> None:
    fault, calls = PLACES[place]
    service.faults = [Fault(fault.place, fault.count)]
    check(run(collect(target, TEXT)), service, TEXT.encode())
    assert service.calls == calls


@pytest.mark.parametrize("place", PLACES)
def test_a_connection_that_is_reset(place: str, service: FakeService, proxy: TcpProxy, tmp_path: Path) -> None:
    fault, _ = PLACES[place]
    service.faults = [Fault(fault.place, fault.count, lambda context: proxy.kill())]
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, "utf-8")
    with Client(f"127.0.0.1:{proxy.port}") as client:
        check(list(client.generate(path)), service, TEXT.encode())
    # What the server sent last may have been lost with the connection: it is a resume or an attach.
    assert service.calls[0] == "generate" and 2 <= len(service.calls) <= 3


def test_ids_go_on_where_they_were(service: FakeService, proxy: TcpProxy) -> None:
    ids = array("I", range(300_000))
    service.faults = [Fault("chunk", 3, lambda context: proxy.kill()), Fault("chunk", 4), Fault("delta", 9)]
    events = run(collect(f"127.0.0.1:{proxy.port}", ids))
    check(events, service, ids.tobytes())
    assert service.calls == ["generate", "resume", "resume", "attach"]


@pytest.mark.parametrize(("status", "message"), [
    (grpc.StatusCode.CANCELLED, "CANCELLED"), (grpc.StatusCode.UNKNOWN, "Stream removed"),
    (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2")])
def test_other_names_of_a_lost_connection(status: grpc.StatusCode, message: str, service: FakeService,
                                          target: str) -> None:
    service.faults = [Fault(place, 2, lambda context: context.abort(status, message))
                      for place in ("chunk", "delta")]
    check(run(collect(target, TEXT)), service, TEXT.encode())


def test_a_conversation_is_attached_to(service: FakeService, target: str) -> None:
    service.faults = [Fault("open"), Fault("delta", 3), Fault("attach")]
    with Client(target) as client:
        events = list(client.chat([{"role": "user", "content": "hello"}]))
    check(events, service, b"user: hello\n")
    assert service.calls == ["chat", "attach", "chat", "attach", "attach"]


def test_a_server_that_asks_for_patience_with_a_request_that_it_has(service: FakeService, target: str) -> None:
    service.faults = [
        Fault("delta", 3),
        Fault("attach", 1, lambda context: refuse(context, grpc.StatusCode.UNAVAILABLE, "draining", "not now",
                                                  retry_after_s=1))]
    began = time.monotonic()
    check(run(collect(target, TEXT)), service, TEXT.encode())
    assert time.monotonic() - began >= 1
    assert service.calls == ["generate", "attach", "attach"]


def test_a_server_that_does_not_come_back(service: FakeService, proxy: TcpProxy) -> None:
    def end(context: grpc.ServicerContext) -> None:
        proxy.refusing = True
        proxy.kill()

    service.faults = [Fault("delta", 3, end)]
    began = time.monotonic()
    with Client(f"127.0.0.1:{proxy.port}", keep_s=1.0) as client, pytest.raises(ConnectionLostError) as caught:
        list(client.generate("one"))
    assert 0.9 < time.monotonic() - began < 8
    assert caught.value.status is grpc.StatusCode.UNAVAILABLE and isinstance(caught.value.__cause__, ClientError)


def test_a_request_that_breaks_every_connection_ends(service: FakeService, target: str) -> None:
    service.faults = [Fault("commit", always=True)]
    with Client(target, keep_s=1.0) as client, pytest.raises(ConnectionLostError):
        list(client.generate("one"))
    assert service.cancelled == [service.only.opening.request_id]


def test_nothing_is_kept(service: FakeService, target: str) -> None:
    service.faults = [Fault("delta", 3)]
    with Client(target, keep_s=0) as client, pytest.raises(ConnectionLostError):
        list(client.generate("one"))
    assert service.calls == ["generate"]


def test_a_request_that_the_server_forgot(service: FakeService, target: str) -> None:
    def forget(context: grpc.ServicerContext) -> None:
        service.held.clear()
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    service.faults = [Fault("delta", 3, forget)]
    with Client(target) as client, pytest.raises(ClientError) as caught:
        list(client.generate("one"))
    assert caught.value.code == "not_found" and not isinstance(caught.value, ConnectionLostError)


def test_leaving_while_the_connection_is_lost(service: FakeService, target: str) -> None:
    service.faults = [Fault("attach", always=True), Fault("delta", 3)]

    async def give_up() -> None:
        async with AsyncClient(target) as client:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.generate_text("one"), 1.0)

    run(give_up())
    assert service.cancelled == [service.only.opening.request_id]
