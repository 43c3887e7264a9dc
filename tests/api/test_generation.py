"""A request between server and engine: whatever ends it, and whenever, the engine is rid of it exactly once."""

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError, ClientDisconnected
from ringserve_api.generation import Generation, Stopped, unless_ended
from ringserve_api.prepare import Kind, prepare
from ringserve_api.state import ServerState
from starlette.types import Message

from ringserve.errors import EngineDeadError, InvalidValueError, OverloadedError
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams
from tests.api.fakes import NO_WISHES, ByteTokenizer, FakeEngine, FakeInfo, FakeStream

BODIES: dict[Kind, bytes] = {
    "completions": b'{"model": "needle", "prompt": "abc", "max_tokens": 2, "priority": 3}',
    "chat": b'{"model": "needle", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}'}


class DeafEngine(FakeEngine):
    """Queues what was cancelled meanwhile all the same."""

    async def submit(self, prompt_token_ids: "array[int] | Sequence[int]", params: SamplingParams, *,
                     request_id: str, return_progress: bool = False,
                     scheduling: SchedulingParams = NO_WISHES) -> FakeStream:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.asked.append("cancelled")
        return await super().submit(prompt_token_ids, params, request_id=request_id,
                                    return_progress=return_progress, scheduling=scheduling)


def run(work: Callable[[Stopped], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await work(asyncio.get_running_loop().create_future())
        assert asyncio.all_tasks() == {asyncio.current_task()}
    asyncio.run(main())


def generation(engine: FakeEngine, stopped: Stopped, kind: Kind = "completions") -> Generation:
    return Generation(engine, prepare(kind, BODIES[kind], ByteTokenizer(), FakeInfo()), "one", stopped)


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def gone() -> Message:
    return {"type": "http.disconnect"}


def test_a_request_is_admitted_and_read() -> None:
    async def work(stopped: Stopped) -> None:
        async with generation(engine, stopped) as opened:
            await opened.submit()
            texts = [output.text for output in (await opened.next(), await opened.next()) if output is not None]
        assert texts == ["a", "b"] and engine.cancelled == []
        assert engine.scheduled == [SchedulingParams(priority=3)]
    engine = FakeEngine()
    run(work)


def test_what_was_never_submitted_is_not_cancelled() -> None:
    async def work(stopped: Stopped) -> None:
        async with generation(engine, stopped):
            pass
        assert engine.asked == engine.cancelled == []
    engine = FakeEngine()
    run(work)


def test_what_was_admitted_and_not_read_is_cancelled_once() -> None:
    async def work(stopped: Stopped) -> None:
        async with generation(engine, stopped) as opened:
            await opened.submit()
        await opened.leave()
        assert engine.cancelled == ["one"]
    engine = FakeEngine()
    run(work)


@pytest.mark.parametrize("error", [OverloadedError("full", 3.0), EngineDeadError("gone"), ZeroDivisionError()])
def test_what_was_refused_is_not_cancelled(error: Exception) -> None:
    async def work(stopped: Stopped) -> None:
        engine.refusal = error  # type: ignore[assignment]
        with pytest.raises(type(error)):
            async with generation(engine, stopped) as opened:
                await unless_ended(never, stopped, opened.submit())
        assert engine.asked == ["one"] and engine.cancelled == engine.withdrawn == []
    engine = FakeEngine()
    run(work)


@pytest.mark.parametrize("kind, param", [("chat", "messages"), ("completions", "prompt")])
def test_a_refusal_names_the_clients_own_field(kind: Kind, param: str) -> None:
    async def work(stopped: Stopped) -> None:
        engine.refusal = InvalidValueError("too odd", "prompt")
        async with generation(engine, stopped, kind) as opened:
            with pytest.raises(InvalidValueError) as caught:
                await opened.submit()
        assert caught.value.param == param
    engine = FakeEngine()
    run(work)


def test_a_client_that_goes_before_the_admission() -> None:
    async def work(stopped: Stopped) -> None:
        engine.admission_s = 60
        with pytest.raises(ClientDisconnected):
            async with generation(engine, stopped) as opened:
                await unless_ended(gone, stopped, opened.submit())
        # The engine's submit has taken the request back; a second word would be one too many.
        assert engine.withdrawn == engine.asked == ["one"]
        assert not engine.submitted and not engine.cancelled
    engine = FakeEngine()
    run(work)


def test_a_request_cancelled_in_the_instant_of_its_admission_is_cancelled_once() -> None:
    async def work(stopped: Stopped) -> None:
        engine.admission_s = 0.01
        opened = generation(engine, stopped)
        submitting = asyncio.create_task(opened.submit())
        await asyncio.sleep(0)
        assert opened._admission is not None
        opened._admission.add_done_callback(lambda _: submitting.cancel())
        with pytest.raises(asyncio.CancelledError):
            await submitting
        assert len(engine.submitted) == 1 and engine.cancelled == []
        await opened.leave()
        assert engine.cancelled == ["one"] and engine.withdrawn == []
    engine = FakeEngine()
    run(work)


def test_an_engine_that_admits_what_was_cancelled_is_told_again() -> None:
    async def work(stopped: Stopped) -> None:
        with pytest.raises(ClientDisconnected):
            async with generation(engine, stopped) as opened:
                await unless_ended(gone, stopped, opened.submit())
        assert engine.asked == ["cancelled", "one"] and engine.cancelled == ["one"]
    engine = DeafEngine()
    run(work)


def test_a_stop_reaches_what_waits_to_be_admitted_and_what_comes_after_it() -> None:
    async def work(_: Stopped) -> None:
        engine.admission_s = 60
        state = ServerState(engine, ByteTokenizer(), ServerConfig())
        error = ApiError("draining", "the server was shut down")
        for moment in ("before", "during"):
            with pytest.raises(ApiError) as caught, state.open_request() as stopped:
                async with generation(engine, stopped) as opened:
                    submitting = asyncio.create_task(unless_ended(never, stopped, opened.submit()))
                    if moment == "before":
                        await asyncio.sleep(0.01)
                        state.stop(error)
                    await submitting
            assert caught.value is error
            assert state.idle.is_set() and state.open_requests == 0
        assert engine.withdrawn == engine.asked and engine.cancelled == []
    engine = FakeEngine()
    run(work)


def test_a_stop_reaches_what_is_being_answered() -> None:
    async def work(stopped: Stopped) -> None:
        engine.step_s = 60
        async with generation(engine, stopped) as opened:
            await opened.submit()
            assert await opened.next(0.01) is None
            stopped.set_exception(EngineDeadError("gone"))
            with pytest.raises(EngineDeadError):
                await opened.next()
        assert engine.cancelled == ["one"]
    engine = FakeEngine()
    run(work)


def test_work_that_is_done_when_the_client_goes_counts() -> None:
    async def work(stopped: Stopped) -> None:
        async def answer() -> int:
            return 3
        assert await unless_ended(gone, stopped, answer()) == 3
    run(work)
