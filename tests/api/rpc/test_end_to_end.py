"""gRPC as its users run it: `ringserve serve needle --grpc-port`, the Python client, and connections that break."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringserve.async_engine import resolve_model
from ringserve.client import Accepted, Client, ClientError, Delta, Event, Finished, Progress
from ringserve.tokenizer import Tokenizer
from tests.api.conftest import eventually
from tests.api.test_end_to_end import ANSWER, ENVIRONMENT, FACT, FILLER, Running, command, serving
from tests.ringserve.client.tcp_proxy import TcpProxy

BOOK = FILLER * 2
PROMPT = BOOK[:20_000] + FACT + BOOK[20_000:] + "The secret code of Ada is"
WANTED = ANSWER[:-1]
LIMITS = {"max_tokens": 17, "temperature": 0.0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving("--grpc-port", "0") as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.grpc_target, model="needle") as opened:
        yield opened


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def test_a_file_is_prefilled_while_it_comes_and_asked(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(PROMPT)
    events = list(client.generate(path, cache_salt="file", **LIMITS))
    assert text_of(events) == WANTED
    assert isinstance(events[0], Accepted) and isinstance(events[-1], Finished)
    usage = events[-1].usage
    assert usage is not None and usage.completion_tokens == 17
    assert usage.cached_tokens > 0, "what was prefilled before the Commit is found"
    assert any(isinstance(event, Progress) and 0 < event.processed_tokens < event.total_tokens for event in events)


def test_ids_give_the_same_answer_as_their_text(client: Client) -> None:
    ids = Tokenizer(resolve_model("needle")).encode(PROMPT)
    answer = client.generate_text(ids, cache_salt="ids", **LIMITS)
    assert answer.text == WANTED and answer.usage is not None and answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("phase", ["upload", "prefill", "decode"])
def test_a_broken_connection_costs_nothing(phase: str, server: Running) -> None:
    host, _, port = server.grpc_target.rpartition(":")
    assert host == "127.0.0.1"
    broken = []

    def break_once() -> None:
        if not broken:
            broken.append(phase)
            proxy.kill()

    def sent(done: int, total: int) -> None:
        if phase == "upload" and done > total / 3:
            break_once()

    with TcpProxy(int(port)) as proxy, Client(f"127.0.0.1:{proxy.port}", model="needle") as client:
        events = []
        for event in client.generate(PROMPT, cache_salt=f"broken in {phase}", on_upload=sent, **LIMITS):
            events.append(event)
            if (phase == "prefill" and isinstance(event, Progress) and event.processed_tokens > 5_000) or (
                    phase == "decode" and len(text_of(events)) > 5):
                break_once()
        assert broken and text_of(events) == WANTED


def test_whoever_leaves_early_leaves_nothing_behind(client: Client) -> None:
    for event in client.generate(PROMPT, cache_salt="left", max_tokens=1000, ignore_eos=True):
        if isinstance(event, Delta):
            break

    def is_gone() -> bool:
        answer = client.estimate(PROMPT, cache_salt="left", max_tokens=1)
        return answer.queue_position == 0 and (answer.queue_ms or 0) == 0
    eventually(is_gone)


def test_a_prompt_too_long_is_refused_before_it_is_sent(client: Client) -> None:
    with pytest.raises(ClientError, match="maximum context length") as refused:
        client.generate_text([1] * 2_000_000, max_tokens=1)
    assert refused.value.code == "context_length_exceeded"


def test_the_command_line(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(PROMPT)
    done = subprocess.run(
        [command()[0], "-m", "ringserve.client", server.grpc_target, "--model", "needle", "--file", str(path),
         "--max-tokens", "17"], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=True)
    assert done.stdout.startswith(WANTED)
