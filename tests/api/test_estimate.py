"""/v1/estimate: what would become of a request. Asking is no error and queues nothing."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ringserve.errors import EngineDeadError, OverloadedError
from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import FakeInfo, sleepy_text
from tests.api.test_http import check_error, connect

HI = [{"role": "user", "content": "hi"}]
COMPLETION: dict[str, Any] = {"model": "needle", "prompt": "x" * 200, "max_tokens": 5}
CHAT: dict[str, Any] = {"model": "needle", "messages": HI}
N_CTX = 8 << 20
UNKNOWN = dict.fromkeys(("cached_tokens", "ring_width", "kv_bytes", "queue_position", "queue_ms",
                         "time_to_first_token_ms"))


def estimate(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/estimate", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def test_of_a_completion(http: httpx.Client, server: RunningServer) -> None:
    assert estimate(http, **COMPLETION) == {
        "object": "estimate", "model": "needle", "fits": True, "prompt_tokens": 200, "cached_tokens": 192,
        "max_output_tokens": 5, "n_ctx": N_CTX, "ring_width": 2, "kv_bytes": 20_500, "queue_position": 4,
        "queue_ms": None, "time_to_first_token_ms": 7}
    assert estimate(http, model="needle", prompt="x")["max_output_tokens"] == 16
    assert not server.engine.submitted and not server.engine.cancelled


def test_of_a_chat(http: httpx.Client, server: RunningServer) -> None:
    answer = estimate(http, **CHAT, service_tier="flex", cache_salt="s")
    assert (answer["fits"], answer["prompt_tokens"], answer["max_output_tokens"]) == (True, 20, N_CTX - 20)
    [wishes] = server.engine.scheduled
    assert (wishes.priority, wishes.cache_salt, wishes.tenant) == (3, "s", "")
    assert http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200
    assert server.engine.submitted[0][1] == server.engine.estimated[0]


def test_what_is_about_the_answer_only_makes_no_difference(http: httpx.Client) -> None:
    plain = estimate(http, **COMPLETION)
    assert estimate(http, **COMPLETION, stream=True, stream_options={"include_usage": True}, echo=True,
                    return_progress=True, return_token_ids=True) == plain
    response = http.post("/v1/estimate", json={**COMPLETION, "foo": 1})
    assert response.headers["x-ringserve-ignored"] == "foo" and response.json() == plain


def test_of_a_prompt_that_does_not_fit(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(FakeInfo(max_model_len=100))
    with httpx.Client(base_url=server.url) as http:
        answer = estimate(http, **COMPLETION)
        reason = answer.pop("reason")
        assert reason.keys() == {"code", "message"} and reason["code"] == "context_length_exceeded"
        assert "100 tokens" in reason["message"] and "200 in the prompt" in reason["message"]
        assert answer == {"object": "estimate", "model": "needle", "fits": False, "prompt_tokens": 200,
                          "max_output_tokens": 5, "n_ctx": 100, **UNKNOWN}
        assert estimate(http, **{**COMPLETION, "prompt": "x" * 95})["fits"]
        assert not estimate(http, **{**COMPLETION, "prompt": "x" * 96})["fits"]
        chat = estimate(http, model="needle", messages=[{"role": "user", "content": "x" * 200}])
        assert not chat["fits"] and chat["reason"]["code"] == "context_length_exceeded"
        check_error(http.post("/v1/completions", json=COMPLETION), 400, "context_length_exceeded")


@pytest.mark.parametrize("seconds, ms", [(2.5, 2500), (0.0001, 1), (-1.0, 0), (1e6, 10**9), (None, None),
                                         (float("inf"), None), (float("nan"), None)])
def test_when_the_engine_is_too_busy(http: httpx.Client, server: RunningServer, seconds: float | None,
                                     ms: int | None) -> None:
    server.engine.refusal = OverloadedError("12 requests wait", seconds)
    response = http.post("/v1/estimate", json=COMPLETION)
    assert response.status_code == 200 and "retry-after" not in response.headers
    assert response.json() == {
        "object": "estimate", "model": "needle", "fits": False, "prompt_tokens": 200, "max_output_tokens": 5,
        "n_ctx": N_CTX, **UNKNOWN,
        "reason": {"code": "server_overloaded", "message": "12 requests wait", "retry_after_ms": ms}}


@pytest.mark.parametrize("body, status, code, param", [
    ({"model": "needle"}, 400, "invalid_value", "prompt"),
    ({"model": "needle", "prompt": "x", "messages": HI}, 400, "invalid_value", "prompt"),
    ({"model": "needle", "prompt": ""}, 400, "invalid_value", "prompt"),
    ({"model": "needle", "prompt": [258]}, 400, "invalid_value", "prompt"),
    ({"model": "needle", "messages": []}, 400, "invalid_value", "messages"),
    ({"model": "needle", "prompt": "x", "priority": 9}, 400, "invalid_value", "priority"),
    ({"model": "needle", "prompt": "x", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"model": "needle", "prompt": "x", "n": 2}, 400, "unsupported_parameter", "n"),
    ({"model": "needle", "messages": HI, "tools": [1]}, 400, "unsupported_parameter", "tools"),
    ({"prompt": "x"}, 400, "invalid_value", "model"), ({"model": "gpt-9"}, 404, "model_not_found", "model"),
    ([], 400, "invalid_json", None)], ids=str)
@pytest.mark.parametrize("pad", [0, 100_000], ids=["inline", "in the worker"])
def test_bad_bodies_are_errors(http: httpx.Client, server: RunningServer, body: Any, status: int, code: str,
                               param: str | None, pad: int) -> None:
    content = json.dumps(body) + " " * pad
    response = http.post("/v1/estimate", content=content, headers={"content-type": "application/json"})
    error = check_error(response, status, code)
    assert error["param"] == param and response.headers["x-should-retry"] == "false"
    assert server.engine.estimated == []


def test_other_bad_requests(http: httpx.Client) -> None:
    check_error(http.get("/v1/estimate"), 405, "method_not_allowed")
    check_error(http.post("/v1/estimate", content=json.dumps(COMPLETION)), 415, "unsupported_media_type")
    check_error(http.post("/v1/estimate", content=b"{", headers={"content-type": "application/json"}), 400,
                "invalid_json")
    check_error(http.post("/v1/estimate", content=b" " * (65 << 20), headers={"content-type": "application/json"}),
                413, "request_too_large")


def test_large_bodies_go_through_the_worker(http: httpx.Client, server: RunningServer) -> None:
    ids = [index % 256 for index in range(200_000)]
    assert estimate(http, model="needle", prompt=ids)["prompt_tokens"] == 200_000
    assert server.engine.estimated == [ids]
    chat = estimate(http, model="needle", messages=[{"role": "user", "content": "añ" * 100_000}])
    assert chat["prompt_tokens"] == 300_018


@pytest.mark.parametrize("prompt", ["x", sleepy_text(60, 300_000)], ids=["the engine", "the worker"])
def test_a_client_that_leaves_is_no_error(server: RunningServer, prompt: str) -> None:
    server.engine.admission_s = 60
    body = json.dumps({**COMPLETION, "prompt": prompt}).encode()
    with connect(server) as sock:
        sock.sendall(b"POST /v1/estimate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n" % len(body) + body)
        eventually(lambda: server.engine.asked or server.server.state.prompt_worker._lock.locked())
    eventually(server.server.state.idle.is_set)
    assert server.engine.withdrawn == server.engine.asked == ["estimate"] * (prompt == "x")
    assert server.engine.cancelled == []


@pytest.mark.parametrize("engine_dies", [False, True])
def test_the_server_ends_meanwhile(start_server: Callable[..., RunningServer], engine_dies: bool) -> None:
    server = start_server(drain_timeout_s=0.2)
    server.engine.admission_s = 60
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/estimate", json=COMPLETION, timeout=20)
        eventually(lambda: server.engine.asked)
        server.engine.die(0) if engine_dies else server.server.shut_down()
        check_error(answer.result(), 503, "engine_dead" if engine_dies else "draining")
    assert server.join() == int(engine_dies)


def test_a_dead_engine_estimates_nothing(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    server.engine.dead = EngineDeadError("gone", 0)
    check_error(httpx.post(f"{server.url}/v1/estimate", json=COMPLETION), 503, "engine_dead")


def test_an_error_that_nobody_expects_is_not_told(http: httpx.Client, server: RunningServer) -> None:
    server.engine.refusal = ZeroDivisionError("secret")  # type: ignore[assignment]
    error = check_error(http.post("/v1/estimate", json=COMPLETION), 500, "internal_error")
    assert "secret" not in str(error)
