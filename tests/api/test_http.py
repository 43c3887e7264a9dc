"""Raw HTTP: the bytes of streams, headers, limits, and errors of every route in one shape."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.routing import APIRoute
from ringserve_api.app import Handlers, create_app, routes
from ringserve_api.config import ServerConfig
from ringserve_api.generate import ignored_header
from ringserve_api.state import ServerState

from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import ByteTokenizer, FakeEngine

BODY = {"model": "needle", "prompt": "abc", "max_tokens": 2}


def check_error(response: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() >= {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    error: dict[str, object] = body["error"]
    return error


def test_the_bytes_of_a_stream(http: httpx.Client, server: RunningServer) -> None:
    server.engine.first_step_s = 0.5
    response = http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert 1 <= events.count(": keep-alive") <= 6
    data = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if event != ": keep-alive"]
    assert [item["choices"][0]["finish_reason"] for item in data] == [None, None, "length"]
    assert not any(line.startswith(("id:", "retry:", "event:")) for line in response.text.split("\n"))


def test_the_first_chunk_does_not_wait_for_a_token(http: httpx.Client, server: RunningServer) -> None:
    server.engine.first_step_s = 60
    with http.stream("POST", "/v1/completions", json={**BODY, "stream": True, "echo": True}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "abc"
    eventually(lambda: server.engine.cancelled)


def test_a_stream_that_fails_ends_with_an_error_object(http: httpx.Client, server: RunningServer) -> None:
    for broken, finish, code in ((True, "length", "internal_error"), (False, "abort", "engine_error"),
                                 (False, None, "engine_error")):
        server.engine.broken, server.engine.finish_reason = broken, finish
        events = http.post("/v1/completions", json={**BODY, "stream": True}).text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        error = json.loads(events[-3].removeprefix("data: "))
        assert error.keys() == {"error"} and error["error"]["code"] == code
        assert "secret" not in events[-3] and "abort" not in events[-3]
        check_error(http.post("/v1/completions", json=BODY), 500, code)


def test_request_ids(http: httpx.Client) -> None:
    given = http.get("/health", headers={"x-request-id": "my.id-1_x"}).headers["x-request-id"]
    assert given == "my.id-1_x"
    for bad in ("", "a b", "x" * 129, "a\tb", "é"):
        minted = http.get("/health", headers=[(b"x-request-id", bad.encode())]).headers["x-request-id"]
        assert minted.startswith("req-") and len(minted) == 36


def test_ignored_fields_are_named_in_a_header(http: httpx.Client) -> None:
    for stream in (False, True):
        response = http.post("/v1/completions", json={**BODY, "stream": stream, "foo": 1, "a\r\nb": 2})
        assert response.headers["x-ringserve-ignored"] == "foo, +1"
    assert "x-ringserve-ignored" not in http.post("/v1/completions", json=BODY).headers
    assert len(ignored_header([f"{i:064}" for i in range(1000)])["x-ringserve-ignored"]) < 1200


@pytest.mark.parametrize("body, code", [
    (b"{", "invalid_json"), (b'{"model": "needle", "prompt": NaN}', "invalid_json"),
    (b'{"prompt": "x"}', "invalid_value"), (b'{"model": "needle", "prompt": ""}', "invalid_value"),
    (b'{"model": "needle", "prompt": [258]}', "invalid_value"), (b'{"model": "needle"}', "invalid_value"),
    (b'{"model": "needle", "prompt": "x", "n": 2}', "unsupported_parameter"),
    (b'{"model": "needle", "prompt": "x", "stream": true, "max_tokens": 9000000}', "context_length_exceeded"),
], ids=str)
def test_bad_requests(http: httpx.Client, server: RunningServer, body: bytes, code: str) -> None:
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = check_error(response, 400, code)
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"
    assert server.engine.submitted == [] and server.engine.cancelled == []


def test_routes_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    check_error(http.get("/nowhere"), 404, "not_found")
    check_error(http.get("/v1/models/other"), 404, "model_not_found")
    response = http.get("/v1/completions")
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_only_plain_json_bodies_are_read(http: httpx.Client) -> None:
    for headers in ({}, {"content-type": "text/plain"},
                    {"content-type": "application/json", "content-encoding": "gzip"}):
        check_error(http.post("/v1/completions", content=json.dumps(BODY), headers=headers), 415,
                    "unsupported_media_type")
    headers = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/v1/completions", content=json.dumps(BODY), headers=headers).status_code == 200


def test_health_routes(http: httpx.Client) -> None:
    for path in ("/health", "/livez", "/readyz"):
        assert http.get(path).json() == {"status": "ok"}
        assert http.head(path).status_code == 200
    assert http.get("/version").json() == {"version": "0.1.0"}


def test_bodies_over_the_limit_are_refused(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    check_error(http.post("/v1/completions", content=b"x" * (65 << 20), headers=headers), 413,
                "request_too_large")

    def endless() -> Iterator[bytes]:
        for _ in range(66):
            yield b"x" * (1 << 20)
    check_error(http.post("/v1/completions", content=endless(), headers=headers), 413,
                "request_too_large")
    assert http.post("/v1/completions", json=BODY).status_code == 200


def connect(server: RunningServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def post_head(length: int) -> bytes:
    return (f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {length}\r\n\r\n").encode()


def test_the_limit_is_told_before_the_body_is_sent(server: RunningServer) -> None:
    with connect(server) as sock:
        sock.sendall(post_head(1 << 40))
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_stops_arriving_is_given_up(server: RunningServer) -> None:
    with connect(server) as sock, sock.makefile("rb") as answer:
        sock.sendall(post_head(100) + b'{"model"')
        data = answer.read()  # up to the end: the server closes
    assert data.startswith(b"HTTP/1.1 408 ") and b"body_idle_timeout" in data


def test_a_client_that_leaves_in_its_body_is_no_error(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(body_idle_timeout_s=60)
    with connect(server) as sock:
        sock.sendall(post_head(100) + b'{"model"')
        eventually(lambda: not server.server.state.idle.is_set())
    eventually(server.server.state.idle.is_set)
    assert server.engine.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_once(server: RunningServer, stream: bool) -> None:
    server.engine.step_s = 60
    body = json.dumps({**BODY, "stream": stream}).encode()
    with connect(server) as sock:
        sock.sendall(post_head(len(body)) + body)
        eventually(lambda: server.engine.submitted)
    eventually(lambda: server.engine.cancelled)
    eventually(server.server.state.idle.is_set)
    assert server.engine.cancelled == [server.engine.submitted[0][0]]


def test_a_slow_reader_holds_the_stream_back(server: RunningServer) -> None:
    body = json.dumps({**BODY, "max_tokens": 1_000_000, "stream": True}).encode()
    with connect(server) as sock:
        sock.sendall(post_head(len(body)) + body)
        eventually(lambda: server.engine.submitted)
        time.sleep(0.5)
        # 200 MB would be on their way if nothing held them back.
        connection = next(iter(server.server._http.server_state.connections))
        assert connection.transport.get_write_buffer_size() < 1 << 20
    eventually(lambda: server.engine.cancelled)


def test_requests_share_a_connection(server: RunningServer) -> None:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    for body in (b"{", json.dumps(BODY).encode(), json.dumps({**BODY, "stream": True}).encode()):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        sock = connection.sock
        connection.getresponse().read()
        assert connection.sock is sock
    connection.close()


def test_every_route_is_in_the_table_with_an_auth_level() -> None:
    state = ServerState(FakeEngine(), ByteTokenizer(), ServerConfig())
    table = {route.path: route.auth for route in routes(Handlers(state))}
    app = create_app(state)
    found = {route.path for route in app.routes if isinstance(route, APIRoute)}
    assert found == table.keys() and len(app.routes) == len(table)
    probes = {"/health", "/livez", "/readyz", "/version"}
    assert {path for path, level in table.items() if level == "open"} == probes
