"""A server with a fake engine, in a thread of its own, on a free loopback port."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from ringserve_api.config import ServerConfig
from ringserve_api.server import Server

from tests.api.fakes import ByteTokenizer, FakeEngine, FakeInfo


class RunningServer:
    def __init__(self, engine: FakeEngine, config: ServerConfig) -> None:
        self.engine = engine
        self.exit_code: int | None = None
        self._ready = threading.Event()
        self.server = Server(engine, ByteTokenizer(), config, on_ready=self._announced)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def _announced(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def _run(self) -> None:
        self.exit_code = asyncio.run(self.server.serve())

    def join(self) -> int:
        self._thread.join(15)
        assert self.exit_code is not None
        return self.exit_code

    def stop(self) -> None:
        if self._thread.is_alive():
            self.server.shut_down()
        self.join()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RunningServer]:
    running = RunningServer(FakeEngine(), ServerConfig(
        port=0, grpc_port=0, grpc_admin_port=0, keep_alive_s=0.15, body_idle_timeout_s=0.5))
    yield running
    running.stop()
    assert running.exit_code == 0


@pytest.fixture
def server(shared_server: RunningServer) -> Iterator[RunningServer]:
    """The server of the whole session, with a fresh engine; nothing may be left open."""
    shared_server.engine.reset()
    yield shared_server
    eventually(shared_server.server.state.idle.is_set)


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of its own for tests that end them."""
    started: list[RunningServer] = []

    def start(info: FakeInfo | None = None, **config: object) -> RunningServer:
        running = RunningServer(FakeEngine(info), ServerConfig(port=0, **config))  # type: ignore[arg-type]
        started.append(running)
        return running

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def eventually(holds: Callable[[], object], seconds: float = 5) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
