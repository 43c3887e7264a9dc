"""A Resume while the connection before it still brings chunks."""

import asyncio
from typing import Any

import grpc
from ringserve_api.config import ServerConfig
from ringserve_api.rpc.inference import Inference
from ringserve_api.rpc.sessions import Sessions
from ringserve_api.state import ServerState

from ringserve.v1 import inference_pb2 as pb
from tests.api.fakes import ByteTokenizer, FakeEngine
from tests.api.rpc.calls import chunk, commit, resume, seconds, text_of, text_open


class Connection:
    """What grpc gives a service for one call, with a client that this test plays."""

    def __init__(self, *messages: pb.GenerateRequest) -> None:
        self.coming: asyncio.Queue[pb.GenerateRequest] = asyncio.Queue()
        self.events: list[pb.Event] = []
        self.status: grpc.Status | None = None
        for message in messages:
            self.coming.put_nowait(message)

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def read(self) -> pb.GenerateRequest:
        return await self.coming.get()

    async def write(self, response: Any) -> None:
        await asyncio.sleep(0.01)
        self.events.append(response.event)

    async def abort_with_status(self, status: grpc.Status) -> None:
        self.status = status
        raise asyncio.CancelledError


async def until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def test_what_a_resume_is_told_stays_true() -> None:
    async def work() -> None:
        state = ServerState(FakeEngine(), ByteTokenizer(), ServerConfig())
        sessions = Sessions(state)
        inference: Any = Inference(state, sessions)
        old = Connection(text_open(request_id="one", keep=seconds(9)), chunk(b"ab"))
        calls = [asyncio.create_task(inference.Generate(None, old))]
        await until(lambda: [session.upload.received for session in sessions if session.upload] == [2])
        new = Connection(resume("one"))
        calls.append(asyncio.create_task(inference.Generate(None, new)))
        await asyncio.sleep(0)
        old.coming.put_nowait(chunk(b"cd", 2))  # it was on its way
        await until(lambda: new.events)
        at = new.events[0].accepted.received_bytes
        await asyncio.sleep(0.05)
        new.coming.put_nowait(chunk(b"abcdef"[at:], at))
        new.coming.put_nowait(commit(b"abcdef"))
        await until(lambda: new.status or new.events[-1].HasField("finished"))
        assert new.status is None and text_of(new.events) == "ab"
        assert state.engine.submitted[-1][1] == list(b"abcdef")  # type: ignore[attr-defined]
        await sessions.close()
        await state.prompt_worker.close()
        await asyncio.gather(*calls, return_exceptions=True)

    async def main() -> None:
        async with asyncio.timeout(10):
            await work()
    asyncio.run(main())
