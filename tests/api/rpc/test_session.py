"""Session: ended whenever, however often, it leaves nothing."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError
from ringserve_api.prepare import prepare
from ringserve_api.rpc.session import Session
from ringserve_api.rpc.sessions import Sessions
from ringserve_api.state import ServerState

from ringserve.errors import OverloadedError
from tests.api.fakes import ByteTokenizer, FakeEngine, FakeInfo

PREPARED = prepare("completions", b'{"model": "needle", "prompt": "abc", "max_tokens": 2}', ByteTokenizer(), FakeInfo())


class SlowToLetGo(FakeEngine):
    async def cancel(self, request_id: str) -> None:
        await asyncio.sleep(0.05)
        await super().cancel(request_id)


def run(work: Callable[[ServerState, Sessions], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        engine = SlowToLetGo()
        engine.step_s = 60
        state = ServerState(engine, ByteTokenizer(), ServerConfig())
        async with asyncio.timeout(10):
            await work(state, Sessions(state))
            while asyncio.all_tasks() != {asyncio.current_task()} or state.open_requests:
                await asyncio.sleep(0.01)
        assert state.open_requests == 0 and state.idle.is_set() and engine.live == set()
    asyncio.run(main())


def begin(sessions: Sessions, keep_s: float = 0, deadline_s: float | None = None, name: str = "") -> Session:
    return sessions.begin(name, PREPARED, None, keep_s, deadline_s)


async def running(session: Session) -> None:
    while len(session.events) == 0:
        await asyncio.sleep(0.01)


def test_forgotten_before_its_first_step() -> None:
    async def work(state: ServerState, sessions: Sessions) -> None:
        begin(sessions).forget()
        assert list(sessions) == []
    run(work)


@pytest.mark.parametrize("steps", range(8))
def test_forgotten_twice(steps: int) -> None:
    """The second time while it leaves the engine after the first."""
    async def work(state: ServerState, sessions: Sessions) -> None:
        session = begin(sessions)
        await running(session)
        session.forget()
        for _ in range(steps):
            await asyncio.sleep(0)
        session.forget()
        session.fail(ApiError("draining", "the server is shutting down"))
        await session.close()
        with pytest.raises(ApiError, match="was cancelled"):
            async for _ in session.events.read(0):
                pass
    run(work)


@pytest.mark.parametrize("steps", range(8))
def test_forgotten_while_its_deadline_ends_it(steps: int) -> None:
    async def work(state: ServerState, sessions: Sessions) -> None:
        session = begin(sessions, deadline_s=0.1)
        await running(session)
        await asyncio.sleep(0.1)
        for _ in range(steps):
            await asyncio.sleep(0)
        session.forget()
    run(work)


def test_no_clock_runs_for_what_was_forgotten() -> None:
    async def work(state: ServerState, sessions: Sessions) -> None:
        session = begin(sessions, keep_s=3600)
        with session.attached():
            await running(session)
        timer = session._timer
        assert timer is not None and not timer.cancelled()
        with session.attached():
            assert timer.cancelled()
            session.forget()
        assert session._timer is None
    run(work)


def test_a_failure_that_has_no_deadline_is_told() -> None:
    """A TimeoutError of somebody else's is none of the deadline."""
    async def work(state: ServerState, sessions: Sessions) -> None:
        async def submit(*_: object, **__: object) -> None:
            raise TimeoutError("secret")
        state.engine.submit = submit  # type: ignore[method-assign,assignment]
        session = begin(sessions)
        with pytest.raises(ApiError) as raised:
            async for _ in session.events.read(0):
                pass
        assert raised.value.code == "internal_error"
        session.forget()
    run(work)


def test_there_is_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringserve_api.rpc.sessions.MOST", 2)

    async def work(state: ServerState, sessions: Sessions) -> None:
        for _ in range(2):
            begin(sessions)
        with pytest.raises(OverloadedError):
            begin(sessions)
        await sessions.close()
        assert list(sessions) == []
    run(work)


def test_a_feeder_takes_the_place_of_the_one_before() -> None:
    async def work(state: ServerState, sessions: Sessions) -> None:
        session = begin(sessions)
        fed: list[str] = []

        async def feed(name: str) -> None:
            try:
                await asyncio.sleep(60)
            finally:
                fed.append(name)
        async with contextlib.AsyncExitStack() as feeds:
            for name in ("one", "two"):
                await feeds.enter_async_context(session.fed(feed(name)))
                await asyncio.sleep(0.01)
            assert fed == ["one"]
        assert fed == ["one", "two"]
        session.forget()
    run(work)
