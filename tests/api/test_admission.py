"""Before the 200: while the engine decides, and when it refuses, over HTTP."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from ringserve_api.errors import wire_error

from ringserve.errors import ContextLengthError, OverloadedError
from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import sleepy_text
from tests.api.test_http import check_error, connect, post_head

BODY = {"model": "needle", "prompt": "abc", "max_tokens": 4}
BOTH = pytest.mark.parametrize("stream", [False, True])


@pytest.mark.parametrize("seconds, header", [
    (None, None), (0.2, "1"), (1.0, "1"), (1.01, "2"), (17.0, "17"), (0.0, "1"), (-5.0, "1"), (1e9, "120"),
    (float("inf"), "120"), (float("nan"), "1")])
def test_when_to_come_back(seconds: float | None, header: str | None) -> None:
    assert wire_error(OverloadedError("full", seconds)).headers.get("retry-after") == header


@BOTH
def test_a_refusal_is_an_ordinary_error(http: httpx.Client, server: RunningServer, stream: bool) -> None:
    server.engine.admission_s = 0.4  # longer than the silence after which streams say that they live
    server.engine.refusal = OverloadedError("12 requests wait", 2.5)
    response = http.post("/v1/completions", json={**BODY, "stream": stream})
    error = check_error(response, 503, "server_overloaded")
    assert error["message"] == "12 requests wait" and response.headers["retry-after"] == "3"
    assert "x-should-retry" not in response.headers
    server.engine.refusal = ContextLengthError(3, 4, 5)
    assert check_error(http.post("/v1/completions", json={**BODY, "stream": stream}), 400,
                       "context_length_exceeded")["n_ctx"] == 5
    assert not server.engine.submitted and not server.engine.cancelled and not server.engine.withdrawn
    server.engine.refusal = None
    assert http.post("/v1/completions", json={**BODY, "stream": stream}).status_code == 200


def test_the_openai_client_comes_back_when_told(server: RunningServer) -> None:
    server.engine.refusal = OverloadedError("full", 0.1)
    with (openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=1, timeout=20) as client,
          ThreadPoolExecutor(1) as pool):
        answer = pool.submit(client.completions.create, model="needle", prompt="abc", max_tokens=4)
        eventually(lambda: server.engine.asked)
        server.engine.refusal = None
        assert answer.result().choices[0].text == "abca"
    assert len(server.engine.asked) == 2


@BOTH
def test_a_client_that_leaves_before_its_admission_is_left_once(server: RunningServer, stream: bool) -> None:
    server.engine.admission_s = 60
    body = json.dumps({**BODY, "stream": stream}).encode()
    with connect(server) as sock:
        sock.sendall(post_head(len(body)) + body)
        eventually(lambda: server.engine.asked)
    eventually(lambda: server.engine.withdrawn)
    eventually(server.server.state.idle.is_set)
    assert server.engine.withdrawn == server.engine.asked and len(server.engine.asked) == 1
    assert not server.engine.submitted and not server.engine.cancelled


@BOTH
def test_a_drain_waits_for_what_waits_to_be_admitted(start_server: Callable[..., RunningServer],
                                                     stream: bool) -> None:
    server = start_server()
    server.engine.admission_s = 0.5
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json={**BODY, "stream": stream}, timeout=20)
        eventually(lambda: server.engine.asked)
        server.server.shut_down()
        assert answer.result().status_code == 200
    assert server.join() == 0
    assert len(server.engine.submitted) == 1 and server.engine.cancelled == []


@BOTH
@pytest.mark.parametrize("engine_dies", [False, True])
def test_the_server_ends_while_requests_wait_to_be_admitted(start_server: Callable[..., RunningServer],
                                                            stream: bool, engine_dies: bool) -> None:
    server = start_server(drain_timeout_s=0.2)
    server.engine.admission_s = 60
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json={**BODY, "stream": stream}, timeout=20)
        eventually(lambda: server.engine.asked)
        server.engine.die(1) if engine_dies else server.server.shut_down()
        error = check_error(answer.result(), 503, "engine_dead" if engine_dies else "draining")
    assert "secret" not in str(error)
    assert server.join() == int(engine_dies)
    assert not server.engine.submitted and not server.engine.cancelled
    assert len(server.engine.withdrawn) <= 1 if engine_dies else server.engine.withdrawn == server.engine.asked


def test_the_server_ends_while_a_large_prompt_is_prepared(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(drain_timeout_s=0.2)
    body: dict[str, Any] = {**BODY, "prompt": sleepy_text(60, 300_000)}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=20)
        eventually(lambda: server.server.state.prompt_worker._lock.locked())
        server.server.shut_down()
        check_error(answer.result(), 503, "draining")
    assert server.join() == 0 and server.engine.asked == []
