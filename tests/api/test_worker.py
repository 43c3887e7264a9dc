"""Large bodies go through the prompt worker, and the server survives whatever happens to it."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.api.conftest import RunningServer, eventually
from tests.api.fakes import sleepy_text

BIG = 300_000
SLEEP_S = 2.0


def pid(server: RunningServer) -> int:
    eventually(lambda: server.server.state.prompt_worker.pid)
    number = server.server.state.prompt_worker.pid
    assert number is not None
    return number


def test_a_large_prompt_is_the_same_through_the_worker(client: openai.OpenAI, http: httpx.Client,
                                                       server: RunningServer) -> None:
    ids = [index % 256 for index in range(1_000_000)]
    answer = http.post("/v1/completions", json={"model": "needle", "prompt": ids, "max_tokens": 30}).json()
    assert answer["usage"]["prompt_tokens"] == 1_000_000
    assert server.engine.submitted[0][1] == ids
    text = "añ" * BIG
    chat = client.chat.completions.create(model="needle", messages=[{"role": "user", "content": text}],
                                          max_tokens=9)
    assert chat.choices[0].message.content == "<user>añ"
    assert pid(server) != os.getpid()


def test_errors_are_the_same_through_the_worker(http: httpx.Client) -> None:
    padding = "x" * BIG
    for fields, status, code, param in (
            ({"model": "needle"}, 400, "invalid_value", "prompt"),
            ({"model": "y"}, 404, "model_not_found", "model"),
            ({"model": "needle", "prompt": "x", "n": 2}, 400, "unsupported_parameter", "n")):
        response = http.post("/v1/completions", json={**fields, "pad": padding})
        assert response.status_code == status and response.headers["x-should-retry"] == "false"
        assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)


def test_health_answers_while_a_large_prompt_is_prepared(http: httpx.Client, server: RunningServer) -> None:
    body = {"model": "needle", "prompt": sleepy_text(SLEEP_S, 4 << 20), "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        large = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=30)
        worst, count = 0.0, 0
        while not large.done():
            started = time.monotonic()
            assert http.get("/health").status_code == 200
            worst, count = max(worst, time.monotonic() - started), count + 1
            time.sleep(0.02)
        assert large.result().status_code == 200
    assert count > 10 and worst < SLEEP_S / 2


def test_a_killed_worker_costs_one_request(http: httpx.Client, server: RunningServer) -> None:
    body = {"model": "needle", "prompt": sleepy_text(SLEEP_S, BIG), "max_tokens": 1}
    first = pid(server)
    killer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
    killer.start()
    response = http.post("/v1/completions", json=body)
    killer.join()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "prompt_worker_failed"
    response = http.post("/v1/completions", json={**body, "prompt": "y" * BIG})
    assert response.status_code == 200
    assert pid(server) != first


def test_a_worker_killed_while_idle_costs_nothing(http: httpx.Client, server: RunningServer) -> None:
    body = {"model": "needle", "prompt": "y" * BIG, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
    worker = server.server.state.prompt_worker
    process = worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: process.returncode is not None)
    assert http.post("/v1/completions", json=body).status_code == 200


def test_a_client_that_leaves_frees_the_worker(server: RunningServer) -> None:
    body = {"model": "needle", "prompt": sleepy_text(60, BIG), "max_tokens": 1}
    assert pid(server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    eventually(server.server.state.idle.is_set)
    assert server.engine.submitted == []


def test_a_prompt_that_takes_too_long_is_given_up(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(prompt_timeout_s=3)
    body = {"model": "needle", "prompt": sleepy_text(60, BIG)}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
    assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"
    small = {"model": "needle", "prompt": "x" * BIG, "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=small, timeout=20).status_code == 200


def test_bodies_in_flight_are_bounded(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(max_body_mib=1, max_bodies_mib=1)
    body = json.dumps({"model": "needle", "prompt": sleepy_text(SLEEP_S, 600_000), "max_tokens": 1})
    headers = {"content-type": "application/json"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{server.url}/v1/completions", content=body, headers=headers,
                            timeout=20)
        eventually(lambda: server.server.state.bodies._in_flight > 600_000)
        second = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=20)
        assert second.status_code == 503 and second.headers["retry-after"] == "1"
        assert second.json()["error"]["code"] == "server_overloaded"
        assert first.result().status_code == 200
    assert server.server.state.bodies._in_flight == 0
