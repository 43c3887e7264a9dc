"""The server's life: ports, draining, signals, and the engine's death."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import pytest
from ringserve_api.config import ServerConfig
from ringserve_api.server import Server, bind_socket, run_server, url_of

from ringserve.errors import ConfigError, EngineDeadError, StartupError
from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import ByteTokenizer, FakeEngine

BODY = {"model": "needle", "prompt": "abc", "max_tokens": 1000}
STREAM = {**BODY, "stream": True}


def error_at_the_end(lines: Iterator[str]) -> dict[str, object]:
    events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    error: dict[str, object] = json.loads(events[-2].removeprefix("data: "))["error"]
    return error


def test_a_port_in_use_is_one_clear_line() -> None:
    with bind_socket(ServerConfig(port=0)) as taken:
        port = taken.getsockname()[1]
        engine = FakeEngine()
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            asyncio.run(run_server(engine, ByteTokenizer(), ServerConfig(port=port)))
        assert engine.closed


def test_addresses() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        ServerConfig(host=host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", "", "127.0.0.1.example.com"):
        with pytest.raises(ConfigError):
            ServerConfig(host=host)
    ServerConfig(host="0.0.0.0", insecure=True)
    for has, lacks in (({}, "no keys and no TLS"), ({"api_keys": "k"}, "no TLS:"),
                       ({"tls_cert": "c", "tls_key": "k"}, "no keys:")):
        with pytest.raises(ConfigError, match=f"other machines reach host '0.0.0.0', and this server has {lacks}"):
            ServerConfig(host="0.0.0.0", **has)  # type: ignore[arg-type]
    ServerConfig(host="0.0.0.0", api_keys="k", tls_cert="c", tls_key="k")
    with pytest.raises(StartupError, match=r"cannot listen on 'no\.such\.host\.invalid'"):
        bind_socket(ServerConfig(host="no.such.host.invalid", insecure=True))
    with bind_socket(ServerConfig(host="localhost", port=0)) as sock:
        assert url_of(sock).startswith("http://") and url_of(sock, "https").startswith("https://")


def test_a_name_that_leads_off_loopback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is what the machine's own table says it is."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("0.0.0.0", 0))])
    with pytest.raises(ConfigError, match=r"host 'localhost', which is 0\.0\.0\.0 here, and this server has no keys"):
        bind_socket(ServerConfig(host="localhost", port=0))
    for allowed in ({"insecure": True}, {"api_keys": "k", "tls_cert": "c", "tls_key": "k"}):
        bind_socket(ServerConfig(host="localhost", port=0, **allowed)).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [
    {"port": -1}, {"port": 65536}, {"keep_alive_s": 0}, {"max_body_mib": 0}, {"max_bodies_mib": 63},
    {"drain_timeout_s": -1}, {"served_model_name": ""}, {"prompt_timeout_s": 0}, {"tenant_header": ""},
    {"tenant_header": "x tenant"}, {"tenant_header": "x-tenant:"}, {"tenant_header": "x-tenant\n"},
    {"tenant_header": "x-ténant"}, {"tenant_header": "x-tenant", "api_keys": "k"}, {"grpc_port": -1},
    {"grpc_admin_port": 65536}, {"grpc_port": 8000}, {"grpc_admin_port": 8000},
    {"grpc_admin_port": 9000, "grpc_port": 9000},
    {"tls_cert": "c"}, {"tls_key": "k"}, {"tls_client_ca": "a"}])
def test_bad_configurations(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ServerConfig(**fields)  # type: ignore[arg-type]


def test_the_served_name(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(served_model_name="org/other")
    with httpx.Client(base_url=server.url) as http:
        assert http.post("/v1/completions",
                         json={**BODY, "model": "org/other"}).json()["model"] == "org/other"
        assert http.post("/v1/completions", json=BODY).status_code == 404
        assert http.get("/v1/models/org/other").json()["id"] == "org/other"
        assert http.get("/v1/models/org%2Fother").json()["id"] == "org/other"


def test_draining_lets_open_requests_finish(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    server.engine.step_s = 0.02
    with httpx.Client(base_url=server.url) as http:
        with http.stream("POST", "/v1/completions", json={**STREAM, "max_tokens": 40}) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.shut_down()
            eventually(lambda: http.get("/readyz").status_code == 503)
            assert http.get("/health").json() == {"status": "draining"}
            assert http.get("/livez").status_code == 200
            refused = http.post("/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert 1 <= int(refused.headers["retry-after"]) <= 30 and refused.headers["connection"] == "close"
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.join() == 0
    assert server.engine.closed and server.engine.cancelled == []


def test_streams_that_outlast_the_drain_end_with_an_error(start_server: Callable[..., RunningServer],
                                                          capfd: pytest.CaptureFixture[str]) -> None:
    server = start_server(drain_timeout_s=0.3)
    server.engine.step_s = 0.05
    with httpx.stream("POST", f"{server.url}/v1/completions", json=STREAM) as response:
        lines = response.iter_lines()
        next(lines)
        server.server.shut_down()
        assert error_at_the_end(lines)["code"] == "draining"
    assert server.join() == 0
    assert len(server.engine.cancelled) == 1
    assert "open requests have ended (1), in 0.3 s" in capfd.readouterr().err


@pytest.mark.parametrize("rank", [1, None])
def test_the_engine_dies(start_server: Callable[..., RunningServer], capfd: pytest.CaptureFixture[str],
                         rank: int | None) -> None:
    server = start_server()
    server.engine.step_s = 30
    with httpx.stream("POST", f"{server.url}/v1/completions", json=STREAM) as response:
        lines = response.iter_lines()
        next(lines)
        server.engine.die(rank)
        error = error_at_the_end(lines)
    assert error["code"] == "engine_dead" and "secret" not in str(error)
    assert server.join() == 1
    assert "the engine died: secret details" in capfd.readouterr().err
    assert server.engine.closed and server.engine.cancelled == []


def test_a_dead_engine_is_told_to_new_requests(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    server.engine.dead = EngineDeadError("gone", 0)
    with httpx.Client(base_url=server.url) as http:
        for path in ("/health", "/livez", "/readyz"):
            assert http.get(path).status_code == 503
        response = http.post("/v1/completions", json=BODY)
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def start_process() -> tuple["subprocess.Popen[str]", str]:
    program = ("import asyncio, sys\n"
               "from tests.api.fakes import *\nfrom ringserve_api.config import ServerConfig\n"
               "from ringserve_api.server import run_server\n"
               "engine = FakeEngine()\nengine.step_s = 0.05\n"
               "sys.exit(asyncio.run(run_server(engine, ByteTokenizer(), ServerConfig(port=0))))\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
                               env=environment)
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    assert url.startswith("http://127.0.0.1:")
    return process, url


def test_signals_drain_and_then_abort() -> None:
    process, url = start_process()
    body = {**STREAM, "max_tokens": 20}
    with process, httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert "length" in [line for line in lines if line][-2]
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert "Ctrl-C again" in (said := process.stderr.read()) and said.count("\n") == 1
    process, url = start_process()
    with process, httpx.stream("POST", f"{url}/v1/completions", json=STREAM) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert error_at_the_end(lines)["code"] == "draining"
        assert process.wait(10) == 128 + signal.SIGINT


def test_a_socket_bound_before() -> None:
    async def run() -> int:
        listener = bind_socket(ServerConfig(port=0))
        expected = url_of(listener)
        urls: list[str] = []

        def ready(url: str) -> None:
            urls.append(url)
            server.shut_down()
        server = Server(FakeEngine(), ByteTokenizer(), ServerConfig(), listener=listener, on_ready=ready)
        code = await server.serve()
        assert urls == [expected]
        return code
    assert asyncio.run(run()) == 0
