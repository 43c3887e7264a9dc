"""What a request brings when nothing breaks: prompts of each kind, errors, cancellation."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from array import array
from collections.abc import Coroutine
from concurrent import futures
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest

from ringserve.client import (
    Accepted,
    AsyncClient,
    Client,
    ClientError,
    Delta,
    Estimated,
    Finished,
    Progress,
)
from ringserve.client.prompt import Prompt
from ringserve.client.upload import CHUNK_BYTES
from ringserve.v1 import inference_pb2 as pb
from tests.ringserve.client.fake_service import DELTAS, FakeService, Fault, refuse

T = TypeVar("T")
TIMEOUT_S = 20.0
IDS = [1, 2, 70_000, 2**32 - 1]


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, TIMEOUT_S))


def test_all_events_of_a_request(service: FakeService, target: str) -> None:
    with Client(target) as client:
        events = list(client.generate("one two", max_tokens=3))
    accepted, estimated, progress = events[:3]
    assert isinstance(accepted, Accepted) and accepted.request_id in service.held
    assert isinstance(estimated, Estimated) and estimated.queue_ms == 0 and estimated.first_token_ms is None
    assert isinstance(progress, Progress) and progress.percent == 50.0 and progress.eta_ms is None
    deltas, finished = events[3:-1], events[-1]
    assert [delta.token_ids for delta in deltas if isinstance(delta, Delta)] == [(n,) for n in range(DELTAS)]
    assert isinstance(finished, Finished) and finished.reason == "length" and finished.stop is None
    assert finished.usage.completion_tokens == DELTAS
    assert service.calls == ["generate"] and not service.cancelled


def test_what_is_asked_for_arrives(service: FakeService, target: str) -> None:
    with Client(target, model="needle", api_key="secret", keep_s=2.5) as client:
        client.generate_text("one", max_tokens=3, temperature=0.0, top_k=-1, stop="end", stop_token_ids=[4],
                             logit_bias={5: 1.5}, ignore_eos=True, priority=-2, cache_salt="mine", deadline_s=1.5,
                             seed=None)
    opening = service.only.opening
    assert opening.model == "needle" and opening.prompt_bytes == 3
    assert opening.prompt_kind == pb.PROMPT_KIND_TEXT
    assert opening.keep.ToTimedelta().total_seconds() == 2.5
    assert len(opening.request_id) >= 32
    sampling = opening.sampling
    assert sampling.max_tokens == 3 and sampling.HasField("temperature") and sampling.temperature == 0
    assert sampling.top_k == -1 and sampling.stop == ["end"] and sampling.stop_token_ids == [4]
    assert sampling.logit_bias == {5: 1.5} and sampling.ignore_eos and not sampling.HasField("seed")
    assert opening.scheduling.priority == -2 and opening.scheduling.cache_salt == "mine"
    assert opening.scheduling.deadline.ToTimedelta().total_seconds() == 1.5
    assert service.metadata[0]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("prompt", [
    IDS, tuple(IDS), array("I", IDS), array("L", IDS), np.array(IDS, dtype=np.uint32), np.array(IDS),
    np.array([IDS, IDS], dtype=np.uint32)[:, ::1][0], np.array(IDS * 2, dtype=np.uint32)[:4]],
    ids=["list", "tuple", "array", "long array", "uint32", "int64", "row", "slice"])
def test_ids_go_up_as_little_endian_u32(prompt: Prompt, service: FakeService, target: str) -> None:
    with Client(target) as client:
        client.generate_text(prompt)
    assert service.only.data == np.array(IDS, dtype="<u4").tobytes()
    assert service.only.opening.prompt_tokens == 4
    assert service.only.opening.prompt_kind == pb.PROMPT_KIND_TOKEN_IDS


@pytest.mark.parametrize("kind", [str, Path])
def test_a_long_text_goes_up_in_chunks(kind: type, service: FakeService, target: str, tmp_path: Path) -> None:
    # Three bytes a character: chunks end within characters.
    text = "€" * CHUNK_BYTES + "x"
    path = tmp_path / "prompt.txt"
    path.write_text(text, "utf-8")
    seen: list[tuple[int, int]] = []
    with Client(target) as client:
        answer = client.generate_text(text if kind is str else path, on_upload=lambda *sizes: seen.append(sizes))
    total = 3 * CHUNK_BYTES + 1
    assert service.only.data.decode() == text
    assert service.only.chunks == [*((n * CHUNK_BYTES, CHUNK_BYTES) for n in range(3)), (3 * CHUNK_BYTES, 1)]
    assert seen == [*(((n + 1) * CHUNK_BYTES, total) for n in range(3)), (total, total)]
    assert answer.text == sha256(text.encode()).hexdigest()
    assert answer.token_ids == list(range(DELTAS)) and len(answer.logprobs) == DELTAS
    assert answer.finish_reason == "length" and answer.request_id == service.only.opening.request_id


def test_no_more_is_sent_than_the_server_reads(service: FakeService, target: str) -> None:
    service.hold = threading.Event()
    sent = 0

    async def upload() -> None:
        nonlocal sent
        stalled = asyncio.Event()

        def on_upload(size: int, total: int) -> None:
            nonlocal sent
            sent = size
            stalled.set()

        async with AsyncClient(target) as client:
            answer = asyncio.create_task(client.generate_text("x" * (64 << 20), on_upload=on_upload))
            with contextlib.suppress(TimeoutError):
                while True:
                    stalled.clear()
                    await asyncio.wait_for(stalled.wait(), 0.5)
            assert 0 < sent < 32 << 20
            assert service.hold is not None
            service.hold.set()
            await answer

    run(upload())
    assert sent == 64 << 20


@pytest.mark.parametrize(("prompt", "words"), [
    (b"bytes", "bytes"), ("\ud800", "surrogate"), ([-1], "token ids"), ([1.5], "token ids"), (["a"], "token ids"),
    (5, "token ids")])
def test_what_is_no_prompt_is_refused(prompt: Any, words: str, target: str) -> None:
    with Client(target) as client, pytest.raises(ClientError, match=words) as caught:
        client.generate_text(prompt)
    assert caught.value.code == "invalid_value" and caught.value.param == "prompt"


def test_options_that_are_none(target: str) -> None:
    with Client(target) as client:
        with pytest.raises(TypeError, match="max_token"):
            client.generate_text("one", max_token=3)  # type: ignore[call-arg]
        with pytest.raises(ClientError) as caught:
            client.generate_text("one", max_tokens="three")  # type: ignore[arg-type]
        assert caught.value.param == "max_tokens"
        with pytest.raises(ClientError, match="deadline_s"):
            client.generate_text("one", deadline_s=float("nan"))


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_the_servers_to_refuse(prompt: Prompt, service: FakeService, target: str) -> None:
    with Client(target) as client, pytest.raises(ClientError, match="the prompt is empty") as caught:
        client.generate_text(prompt)
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.code == "invalid_value" and caught.value.param == "prompt"
    assert caught.value.metadata == {"n_ctx": "8"} and caught.value.retry_after_s is None
    assert service.calls == ["generate"] and not service.cancelled


@pytest.mark.parametrize("attempt", range(5))
def test_a_refusal_is_heard_in_the_middle_of_an_upload(attempt: int, service: FakeService, target: str) -> None:
    service.faults = [Fault("chunk", 3, lambda context: refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "context_length_exceeded", "too long", param="prompt"))]
    with Client(target) as client, pytest.raises(ClientError, match="too long") as caught:
        client.generate_text("x" * (16 << 20))
    assert caught.value.code == "context_length_exceeded"
    assert service.calls == ["generate"]


def test_a_busy_server_is_not_asked_again(service: FakeService, target: str) -> None:
    service.faults = [Fault("open", 1, lambda context: refuse(
        context, grpc.StatusCode.UNAVAILABLE, "server_overloaded", "the queue is full", retry_after_s=7))]
    with Client(target) as client, pytest.raises(ClientError, match="queue is full") as caught:
        client.generate_text("one")
    assert caught.value.code == "server_overloaded" and caught.value.retry_after_s == 7
    assert service.calls == ["generate"]


def test_a_loop_left_early_cancels_the_request(service: FakeService, target: str) -> None:
    service.endless = True
    with Client(target) as client:
        for event in client.generate("one"):
            if isinstance(event, Delta):
                break
        assert service.was_cancelled.wait(TIMEOUT_S)
    assert service.cancelled == [service.only.opening.request_id]


def test_an_async_generator_that_is_closed_cancels_the_request(service: FakeService, target: str) -> None:
    service.endless = True

    async def leave() -> None:
        async with AsyncClient(target) as client, contextlib.aclosing(client.generate("one")) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break

    run(leave())
    assert service.cancelled == [service.only.opening.request_id]


def test_a_client_that_is_closed_cancels_what_was_left(service: FakeService, target: str) -> None:
    service.endless = True

    async def leave() -> None:
        async with AsyncClient(target) as client:
            events = client.generate("one")
            await anext(events)
        with pytest.raises(ClientError, match="closed"):
            await anext(events)

    run(leave())
    assert service.cancelled == [service.only.opening.request_id]


def test_a_cancelled_task_cancels_the_request(service: FakeService, target: str) -> None:
    service.endless = True

    async def give_up() -> None:
        async with AsyncClient(target) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate_text("one"), 0.5)

    run(give_up())
    assert service.cancelled == [service.only.opening.request_id]


def test_an_upload_that_cannot_go_on_cancels_the_request(service: FakeService, target: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("x" * 3 * CHUNK_BYTES)

    def change(sent: int, total: int) -> None:
        with path.open("a") as file:
            file.write("y")

    with Client(target) as client:
        with pytest.raises(ClientError, match="changed while it was sent"):
            client.generate_text(path, on_upload=change)
        with pytest.raises(ZeroDivisionError):
            client.generate_text(path, on_upload=lambda sent, total: 1 / 0)
        with pytest.raises(FileNotFoundError):
            client.generate_text(tmp_path / "nothing")
    # The second one may have ended before the server saw its Open.
    assert len(service.cancelled) == 2 and service.held.keys() <= set(service.cancelled)


def test_the_short_calls(service: FakeService, target: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with Client(target) as client:
        events = list(client.chat(messages, max_tokens=4))
        assert "".join(event.text for event in events if isinstance(event, Delta)) == (
            sha256(b"user: hello\n").hexdigest())
        assert client.estimate(prompt_tokens=9).prompt_tokens == 9
        assert client.estimate([1, 2]).prompt_tokens == 2
        assert client.estimate("abc").first_token_ms == 0
        with pytest.raises(TypeError, match="one of"):
            client.estimate()
        assert client.tokenize("ab") == [97, 98]
        assert client.tokenize(messages) == [5]
        [model] = client.models()
        assert (model.name, model.max_tokens, model.ring_size) == ("needle", 4096, 2)
        client.cancel("a-request")
    assert service.cancelled == ["a-request"]
    with pytest.raises(ClientError, match="closed"):
        client.models()


def test_no_server(target: str) -> None:
    with Client("127.0.0.1:1", connect_timeout_s=0.3) as client, pytest.raises(ClientError) as caught:
        client.models()
    assert caught.value.code == "connection_failed" and caught.value.status is grpc.StatusCode.UNAVAILABLE


def test_the_command_line(service: FakeService, target: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ringserve.client", target, "--text", "one", "--max-tokens", "4"],
                          capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == sha256(b"one").hexdigest() + "\n"
    assert "ended by length" in done.stderr
    assert service.only.opening.sampling.max_tokens == 4


def test_the_client_imports_no_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ringserve.client; print(sorted({'torch', 'numpy', 'transformers', 'rich', "
         "'ringserve.llm', 'ringserve.async_engine'} & sys.modules.keys()))"],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert done.stdout.strip() == "[]"


def test_clients_side_by_side(service: FakeService, target: str) -> None:
    """Several loops in one process, and several threads on one client."""
    with Client(target) as one, Client(target) as other, futures.ThreadPoolExecutor(6) as pool:
        async def beside() -> str:
            async with AsyncClient(target) as client:
                return (await client.generate_text("c" * CHUNK_BYTES)).text

        answers = [pool.submit(client.generate_text, letter * CHUNK_BYTES)
                   for client, letter in ((one, "a"), (other, "b"), (one, "c"), (other, "d"))]
        third = pool.submit(run, beside())
        texts = [answer.result(TIMEOUT_S).text for answer in answers] + [third.result(TIMEOUT_S)]
    assert texts == [sha256(letter.encode() * CHUNK_BYTES).hexdigest() for letter in "abcdc"]
