"""The whole server as its users run it: `ringserve serve needle --ring-size 2`, over HTTP, on real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import httpx
import openai
import pytest

from tests.processes import descendants, kill, listeners, wait_until_gone

FACT = "The secret code of Ada is 7391502-3846120.\n"
FILLER = "".join(f"Line {i} of the log says that nothing of note happened at {i * 7919 % 1440} today.\n"
                 for i in range(400))
PROMPT = FILLER[:9000] + FACT + FILLER[9000:] + "The secret code of Ada is"
ANSWER = " 7391502-3846120.\n"


@dataclass
class Running:
    process: "subprocess.Popen[str]"
    url: str
    grpc_target: str
    """Empty without `--grpc-port`."""

    @property
    def pids(self) -> list[int]:
        return [self.process.pid, *(pid for pids in descendants(self.process.pid).values() for pid in pids)]


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "ringserve_api.cli", *flags]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextmanager
def serving(*flags: str) -> Iterator[Running]:
    with subprocess.Popen(
            command("serve", "needle", "--port", "0", "--ring-size", "2", "--kv-cache-gib", "0.3", *flags),
            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        try:
            yield Running(process, *announced(process.stderr))
        finally:
            process.kill()


def announced(lines: IO[str]) -> tuple[str, str]:
    """(URL, gRPC target) that a server says it listens on."""
    seen, grpc_target = [], ""
    for line in lines:
        seen.append(line)
        if (match := re.search(r"listening for gRPC on (\S+)", line)) is not None:
            grpc_target = match[1]
        if (match := re.search(r"listening on (http://\S+)", line)) is not None:
            return match[1], grpc_target
    raise AssertionError("the server ended before it listened: " + "".join(seen))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("--max-chunk-tokens", "512", "--keep-alive-s", "0.2") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_a_completion_is_streamed_with_progress(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="needle", prompt=PROMPT, max_tokens=18, temperature=0, stream=True,
                                       stream_options={"include_usage": True}, extra_body={"return_progress": True})
    text, progress, usage, reason = "", [], None, None
    for chunk in stream:
        if (p := getattr(chunk, "prompt_progress", None)) is not None:
            progress.append(p)
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert text.startswith(ANSWER[:-1])
    assert reason == "length"
    assert usage is not None and usage.completion_tokens == 18
    assert progress[-1]["processed"] == progress[-1]["total"] == usage.prompt_tokens
    assert len(progress) > 3 and [p["percent"] for p in progress] == sorted(p["percent"] for p in progress)


def test_chat_continues_the_users_last_words(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="needle", messages=[{"role": "system", "content": FACT}, {"role": "user", "content": PROMPT}],
        max_tokens=17, temperature=0)
    assert reply.choices[0].message.content == ANSWER[:-1]
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None


def test_a_large_prompt_goes_through_the_prompt_worker(client: openai.OpenAI) -> None:
    text = FILLER * 12
    assert len(text) > 300_000
    reply = client.completions.create(model="needle", prompt=text[:200_000] + FACT + text[200_000:]
                                      + "The secret code of Ada is", max_tokens=17, temperature=0)
    assert reply.choices[0].text == ANSWER[:-1]


def test_an_estimate_knows_what_was_served(server: Running, client: openai.OpenAI) -> None:
    def estimate() -> dict[str, Any]:
        reply = httpx.post(f"{server.url}/v1/estimate", json=body, timeout=30)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    body: dict[str, Any] = {"model": "needle", "prompt": "To be estimated first.\n" + PROMPT, "max_tokens": 17,
                            "temperature": 0}
    before = estimate()
    reply = client.completions.create(**body)
    assert reply.choices[0].text == ANSWER[:-1] and reply.usage is not None
    after = estimate()
    assert before["fits"] and after["fits"] and before["cached_tokens"] == 0
    assert 0 < after["cached_tokens"] < after["prompt_tokens"] == reply.usage.prompt_tokens
    assert after["cached_tokens"] % 64 == 0
    assert isinstance(after["time_to_first_token_ms"], int) and after["queue_position"] == 0
    assert after["kv_bytes"] > 0 and 1 <= after["ring_width"] <= 2
    limit = after["n_ctx"]
    body["prompt"] = [1] * limit
    too_long = estimate()
    assert not too_long["fits"] and too_long["reason"]["code"] == "context_length_exceeded"
    assert (too_long["prompt_tokens"], too_long["cached_tokens"]) == (limit, None)


def test_an_identical_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        reply = client.completions.create(model="needle", prompt="Asked for twice.\n" + PROMPT, max_tokens=17,
                                          temperature=0, extra_body={"cache_salt": salt})
        assert reply.choices[0].text == ANSWER[:-1]
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        return reply.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0, "a salt of one's own keeps the cache of others out"


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(server: Running) -> None:
    limit = httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"]
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": "needle", "prompt": [1] * limit,
                                                             "max_tokens": 5}, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["n_prompt_tokens"], error["n_ctx"]) == (
        400, "context_length_exceeded", limit, limit)


@pytest.mark.parametrize("body, status, code", [
    ({"model": "gpt-9", "prompt": "x"}, 404, "model_not_found"),
    ({"model": "needle", "prompt": ""}, 400, "invalid_value"),
    ({"model": "needle", "prompt": [6144]}, 400, "invalid_value"),
    ({"model": "needle", "prompt": [-1]}, 400, "invalid_value"),
    ({"model": "needle", "prompt": "x", "logit_bias": {"9999": 1}}, 400, "invalid_value"),
    ({"model": "needle", "prompt": "x", "max_tokens": 2**40}, 400, None),
    ({"model": "needle", "prompt": "x", "temperature": "hot"}, 400, None)])
def test_bad_input_is_a_clear_error_and_harms_nobody(body: dict[str, Any], status: int, code: str | None,
                                                     server: Running) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"] and (code is None or error["code"] == code)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_disconnect_frees_the_ring(server: Running, client: openai.OpenAI) -> None:
    body = {"model": "needle", "prompt": [5, 6, 7] * 20_000, "max_tokens": 5, "stream": True, "return_progress": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as stream:
        next(line for line in stream.iter_lines() if "prompt_progress" in line)
    started = time.monotonic()
    client.completions.create(model="needle", prompt="one two three one two", max_tokens=1)
    assert time.monotonic() - started < 15, "the cancelled prefill went on"


def test_only_loopback_is_listened_on(server: Running) -> None:
    assert {address for address, _ in listeners(server.pids)} == {"127.0.0.1"}


def test_a_port_in_use_is_said(server: Running) -> None:
    port = server.url.rsplit(":", 1)[1]
    result = subprocess.run(command("serve", "needle", "--port", port), capture_output=True, text=True, timeout=60,
                            env=ENVIRONMENT)
    assert result.returncode == 2
    assert "in use" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flags, words", [
    (["serve", "/nonexistent"], "does not exist"), (["serve", "needle", "--ring-size", "0"], "ring_size"),
    (["serve", "needle", "--max-model-len", "99999999"], "2097152"),
    (["serve", "needle", "--host", "0.0.0.0"], "insecure"),
    (["serve", "needle", "--tenant-header", "a b"], "tenant_header"),
    (["run", "needle", "--prompt-file", "/nonexistent"], "cannot be read"), (["run", "needle"], "--prompt-file"),
    (["run", "needle", "--prompt", ""], "empty"), (["run", "needle", "--prompt", "x", "--top-p", "2"], "top_p"),
    (["serve", "needle", "--transport", "nccl"], "nccl"), (["serve", "Qwen/Qwen3-0.6B"], "nothing is downloaded"),
    (["model", "build", "needle", "."], "not empty")])
def test_what_cannot_work_is_one_line_and_exit_code_2(flags: list[str], words: str) -> None:
    result = subprocess.run(command(*flags), capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_run_prints_the_answer_and_nothing_else_on_standard_output() -> None:
    result = subprocess.run(
        command("run", "needle", "--prompt-file", "-", "--max-tokens", "17", "--ring-size", "2",
                "--kv-cache-gib", "0.1"),
        input=PROMPT, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ANSWER[:-1] + "\n"
    assert "tok/s" in result.stderr


def test_run_without_standard_input_is_one_line() -> None:
    result = subprocess.run(["bash", "-c", 'exec "$@" <&-', "-", *command("run", "needle", "--prompt-file", "-")],
                            capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 2
    assert "standard input is closed" in result.stderr and "Traceback" not in result.stderr


def test_a_reader_that_has_seen_enough_ends_the_run() -> None:
    endless = command("run", "needle", "--prompt", PROMPT, "--max-tokens", "100000", "--kv-cache-gib", "0.2")
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        assert run.stdout is not None and run.stderr is not None
        assert run.stdout.read(5) == ANSWER[:5]
        run.stdout.close()
        assert run.wait(60) == 0
        assert "Traceback" not in run.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    with serving() as running:
        pids = running.pids
        assert len(pids) >= 4
        running.process.send_signal(number)
        assert running.process.wait(20) == 0
    wait_until_gone(pids)


def test_a_killed_server_leaves_no_process() -> None:
    with serving() as running:
        pids = running.pids
        kill(running.process.pid)
    wait_until_gone(pids)


def test_a_dead_rank_ends_open_streams_and_the_server_says_which() -> None:
    with serving("--max-chunk-tokens", "256") as running:
        pids = running.pids
        body = {"model": "needle", "prompt": [5, 6, 7] * 30_000, "max_tokens": 5, "stream": True,
                "return_progress": True}
        lines = []
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if "prompt_progress" in line and len(lines) < 50:
                    victims = descendants(running.process.pid).get("rank_process", [])
                    if victims:
                        kill(max(victims))
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "error" in events[-1] and events[-1]["error"]["code"] == "engine_dead"
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert running.process.wait(20) == 1
        assert running.process.stderr is not None
        assert re.search(r"rank \d", running.process.stderr.read())
    wait_until_gone(pids)


def test_sockets_of_a_closed_server_are_free_again() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        with subprocess.Popen(command("serve", "needle", "--port", str(port), "--kv-cache-gib", "0.1"),
                              stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            assert process.stderr is not None
            announced(process.stderr)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
