"""The messages of an upload, without a server."""

import asyncio
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from ringserve.client.errors import ClientError
from ringserve.client.prompt import prompt_source
from ringserve.client.upload import CHUNK_BYTES, Upload


async def messages(upload: Upload, offset: int = 0, most: int = 1 << 30) -> list[Any]:
    found = []
    async for message, _ in upload.messages(offset):
        found.append(message)
        if len(found) == most:
            break
    return found


def test_four_million_ids() -> None:
    ids = array("I", range(4_000_000))
    upload = Upload(prompt_source(ids))

    async def check() -> int:
        count, expected = 0, memoryview(ids).cast("B")
        async for message, sent in upload.messages(0):
            if message.HasField("commit"):
                assert message.commit.total_bytes == sent == expected.nbytes
                assert message.commit.sha256 == sha256(expected).digest()
                continue
            chunk = message.chunk
            assert chunk.offset == count * CHUNK_BYTES
            assert chunk.data == expected[chunk.offset:sent]
            assert chunk.crc32c == google_crc32c.value(chunk.data)
            count += 1
        return count

    assert asyncio.run(check()) == -(-16_000_000 // CHUNK_BYTES)


def test_ids_are_not_copied() -> None:
    ids = array("I", [1, 2])
    source = prompt_source(ids)
    ids[0] = 7
    assert asyncio.run(source.read(0, 4)) == b"\7\0\0\0"


@pytest.mark.parametrize("seen", [1, 2, 3, 4])
@pytest.mark.parametrize("back", [0, 1, CHUNK_BYTES - 3, CHUNK_BYTES])
def test_the_hash_is_right_wherever_it_goes_on(seen: int, back: int, tmp_path: Path) -> None:
    text = "€" * CHUNK_BYTES
    path = tmp_path / "prompt"
    path.write_text(text, "utf-8")
    upload = Upload(prompt_source(path))
    assert len(asyncio.run(messages(upload, most=seen))) == seen
    offset = min(seen, 3) * CHUNK_BYTES - back
    again = asyncio.run(messages(upload, offset))
    assert b"".join(m.chunk.data for m in again[:-1]) == text.encode()[offset:]
    assert again[-1].commit.sha256 == sha256(text.encode()).digest()


def test_a_server_that_asks_for_what_was_never_sent() -> None:
    with pytest.raises(ClientError, match="from byte 9 on") as caught:
        asyncio.run(messages(Upload(prompt_source("short")), 9))
    assert caught.value.code == "protocol_error"


def test_only_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="not a regular file"):
        prompt_source(tmp_path)
