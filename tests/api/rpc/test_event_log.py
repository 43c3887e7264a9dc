"""EventLog: every reader sees every numbered event once and in order, whenever it comes and however slow it is."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_api.rpc.event_log import EventLog

from ringserve.errors import EngineError, InvalidValueError
from ringserve.v1 import inference_pb2 as pb


def delta(text: str = "") -> pb.Event:
    return pb.Event(delta=pb.Delta(text=text))


def queued(position: int) -> pb.Event:
    return pb.Event(queued=pb.Queued(position=position))


async def pause(steps: int) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


def run(work: Callable[[], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await work()
    asyncio.run(main())


Steps = st.lists(st.tuples(st.sampled_from(["add", "tell"]), st.integers(0, 3)), max_size=25)
Readers = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 10), st.integers(0, 3)), max_size=4)


@settings(deadline=None)
@given(Steps, Readers)
def test_readers_see_everything_once(steps: list[tuple[str, int]], readers: list[tuple[int, int, int]]) -> None:
    async def work() -> None:
        log = EventLog()

        async def write() -> None:
            for number, (what, rest) in enumerate(steps):
                (log.add if what == "add" else log.tell)(delta(str(number)) if what == "add" else queued(number + 1))
                await pause(rest)
            log.end()

        async def read(start: int, after: int, slowness: int) -> tuple[int, list[pb.Event]]:
            await pause(start)
            after = min(after, len(log))
            seen = []
            async for event in log.read(after):
                seen.append(event)
                await pause(slowness)
            return after, seen

        results = await asyncio.gather(write(), *(read(*reader) for reader in readers))
        texts = [str(number) for number, (what, _) in enumerate(steps) if what == "add"]
        for after, seen in results[1:]:  # type: ignore[misc]
            numbered = [event for event in seen if event.HasField("delta")]
            assert [event.sequence for event in numbered] == list(range(after + 1, len(texts) + 1))
            assert [event.delta.text for event in numbered] == texts[after:]
            told = [event.queued.position for event in seen if event.HasField("queued")]
            assert told == sorted(set(told))
            before = after
            for event in seen:
                assert event.sequence == before + event.HasField("delta")
                before = event.sequence
    run(work)


def test_what_was_told_last_is_what_a_reader_finds() -> None:
    async def work() -> None:
        log = EventLog()
        log.add(delta())
        log.tell(queued(2))
        log.tell(queued(1))
        reader = log.read(0)
        assert (await anext(reader)).sequence == 1 and (await anext(reader)).queued.position == 1
        log.add(delta())
        assert (await anext(reader)).sequence == 2
        log.end()
        assert await anext(reader, None) is None
    run(work)


def test_an_error_comes_after_the_events_and_to_every_reader() -> None:
    async def work() -> None:
        log = EventLog()
        log.add(delta())
        log.end(EngineError("first"))
        log.end(EngineError("second"))
        lengths = []
        for _ in range(3):
            seen = []
            with pytest.raises(EngineError, match="first") as raised:
                async for event in log.read(0):
                    seen.append(event)
            assert len(seen) == 1
            lengths.append(len(traceback.extract_tb(raised.value.__traceback__)))
        assert len(set(lengths)) == 1
    run(work)


def test_a_number_that_no_event_had() -> None:
    async def work() -> None:
        with pytest.raises(InvalidValueError, match="only 0 events"):
            await anext(EventLog().read(1))
    run(work)
