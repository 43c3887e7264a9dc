"""Upload: whatever the chunks, the ids are those of the whole."""

import asyncio
import hashlib
import itertools
from array import array
from collections.abc import Callable, Coroutine
from typing import Any, cast

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ringserve_api.body import BodyReader
from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError
from ringserve_api.rpc import upload as upload_module
from ringserve_api.rpc.upload import PART, Upload
from ringserve_api.worker_pool import PromptWorker

from ringserve.errors import ContextLengthError, InvalidValueError
from ringserve.v1 import inference_pb2 as pb
from tests.api.fakes import ByteTokenizer


class Worker(ByteTokenizer):
    """The prompt worker, here; `wrong` ids at once are not those in parts."""

    def __init__(self, slowness: int = 0, wrong: bool = False) -> None:
        super().__init__()
        self.slowness, self.wrong = slowness, wrong
        self.jobs = 0

    async def encode_part(self, text: str, *, final: bool, tenant: str = "") -> "tuple[array[int], int]":  # type: ignore[override]
        self.jobs += 1
        for _ in range(self.slowness):
            await asyncio.sleep(0)
        return super().encode_part(text, final=final, tenant=tenant)

    async def encode_at_once(self, text: str) -> "array[int]":  # type: ignore[override]
        return super().encode_at_once(text) + array("I", [7] * self.wrong)


def make(worker: Worker | None = None, kind: "pb.PromptKind" = pb.PROMPT_KIND_TEXT, n_ctx: int = 1 << 20,
         bodies: BodyReader | None = None) -> Upload:
    return Upload(kind, (array("I", [1]), array("I", [2])), cast(PromptWorker, worker or Worker()),
                  bodies or BodyReader(ServerConfig()), "acme", n_ctx, 1)


def chunk(data: bytes, offset: int) -> pb.PromptChunk:
    return pb.PromptChunk(offset=offset, data=data, crc32c=google_crc32c.value(data))


def commit(data: bytes) -> pb.Commit:
    return pb.Commit(total_bytes=len(data), sha256=hashlib.sha256(data).digest())


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await work()
        assert asyncio.all_tasks() == {asyncio.current_task()}
    asyncio.run(main())


TEXTS = st.text(st.sampled_from("ab\né中🙂 "), min_size=1, max_size=200)
CUTS = st.lists(st.integers(0, 800), max_size=12)


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(1, 40), st.integers(0, 3))
def test_any_chunks_of_any_text(text: str, cuts: list[int], part: int, slowness: int) -> None:
    data = text.encode()
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]

    async def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upload_module, "PART", part)
            upload = make(Worker(slowness))
            for start, end in itertools.pairwise(places):
                await upload.add(chunk(data[start:end], start))
                assert upload.received == end and list(upload.ids) == [1, *data[:len(upload.ids) - 1]]
            upload.commit(commit(data))
            await upload.finish()
            assert list(upload.ids) == [1, *data, 2]
    run(work)


@settings(deadline=None)
@given(TEXTS, CUTS, st.integers(1, 5))
def test_chunks_of_a_client_that_went_and_came_back(text: str, cuts: list[int], slowness: int) -> None:
    """Its last chunk is still being tokenized when the next one comes."""
    data = text.encode()
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]

    async def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upload_module, "PART", 1)
            upload = make(Worker(slowness))
            for start, end in itertools.pairwise(places):
                adding = asyncio.create_task(upload.add(chunk(data[start:end], start)))
                while upload.received < end:
                    await asyncio.sleep(0)
                adding.cancel()
                await asyncio.wait({adding})
            upload.commit(commit(data))
            await upload.finish()
            assert list(upload.ids) == [1, *data, 2]
    run(work)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.integers(1, 9))
def test_any_ids(ids: list[int], size: int) -> None:
    data = b"".join(token.to_bytes(4, "little") for token in ids)

    async def work() -> None:
        upload = make(kind=pb.PROMPT_KIND_TOKEN_IDS)
        for at in range(0, len(data), 4 * size):
            await upload.add(chunk(data[at:at + 4 * size], at))
        upload.commit(commit(data))
        await upload.finish()
        assert list(upload.ids) == ids and await upload.tokenized_at_once() is None
    run(work)


def test_a_text_without_a_place_to_cut_is_not_looked_through_again_and_again() -> None:
    async def work() -> None:
        worker = Worker()
        upload = make(worker, n_ctx=8 << 20)
        for at in range(0, 2 << 20, 1 << 12):
            await upload.add(chunk(b"x" * (1 << 12), at))
        assert worker.jobs <= ((2 << 20) // PART).bit_length()  # each time twice as long, out of 512 chunks
    run(work)


def test_small_chunks_cost_no_more_the_more_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART", 1 << 30)

    async def work() -> None:
        upload = make(n_ctx=1 << 30)
        for at in range(64):
            await upload.add(chunk(b"x" * (1 << 20), at << 20))
        async with asyncio.timeout(2):  # and not 20 ms for each byte
            for at in range(2000):
                await upload.add(chunk(b"y", (64 << 20) + at))
    run(work)


def test_too_much_without_a_place_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART", 10)
    monkeypatch.setattr(upload_module, "MAX_TAIL", 100)

    async def work() -> None:
        with pytest.raises(ApiError, match="more than 100 bytes"):
            await make().add(chunk(b"x" * 101, 0))
    run(work)


def test_a_text_that_outgrows_the_context_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_module, "PART", 10)

    async def work() -> None:
        upload = make(n_ctx=60)
        await upload.add(chunk(b"line\n" * 10, 0))
        with pytest.raises(ContextLengthError):
            await upload.add(chunk(b"line\n" * 10, 50))
    run(work)


def test_other_ids_at_once_are_told() -> None:
    async def work() -> None:
        upload = make(Worker(wrong=True))
        await upload.add(chunk(b"ab", 0))
        upload.commit(commit(b"ab"))
        await upload.finish()
        assert list(await upload.tokenized_at_once() or []) == [97, 98, 7]
    run(work)


def test_what_has_ended_holds_nothing_and_takes_nothing() -> None:
    async def work() -> None:
        bodies = BodyReader(ServerConfig())
        upload = make(bodies=bodies)
        await upload.add(chunk(b"abc", 0))
        assert bodies._in_flight == 3
        upload.release()
        upload.release()
        with pytest.raises(ApiError, match="has ended"):
            await upload.add(chunk(b"d", 3))
        assert bodies._in_flight == 0 and len(upload.ids) == 0
    run(work)


def test_bytes_are_in_flight_no_longer_than_they_are_needed() -> None:
    async def work() -> None:
        bodies = BodyReader(ServerConfig())
        upload = make(bodies=bodies)
        await upload.add(chunk(b"abc", 0))
        upload.commit(commit(b"abc"))
        await upload.finish()
        await upload.tokenized_at_once()
        assert bodies._in_flight == 0
    run(work)


def test_no_prompt() -> None:
    with pytest.raises(InvalidValueError, match="empty"):
        make().commit(commit(b""))
