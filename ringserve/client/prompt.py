"""A prompt, wherever it lies: its bytes from any place on, as often as a lost connection needs them."""

import asyncio
import os
import stat
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

from ringserve.client.errors import invalid
from ringserve.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    import numpy as np

Prompt = Union[Path, str, Sequence[int], "array[int]", "np.ndarray[Any, Any]"]
"""A file of UTF-8, a text, or token ids."""
TOKEN_BYTES = 4


class PromptSource(Protocol):
    kind: pb.PromptKind
    total_bytes: int

    async def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""


class MemoryPrompt:
    """A text, or ids: little-endian u32, not copied where they lie so already."""

    def __init__(self, data: memoryview, kind: pb.PromptKind) -> None:
        self.kind, self.total_bytes = kind, data.nbytes
        self._data = data

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self._data[offset:offset + size])


class FilePrompt:
    """A file, of which no more than a chunk is in memory. It must not change while it goes up."""

    kind = pb.PROMPT_KIND_TEXT

    def __init__(self, path: Path) -> None:
        self._path = path
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise invalid(f"{path} is not a regular file", "prompt")
        self.total_bytes = found.st_size
        self._version = _version(found)

    async def read(self, offset: int, size: int) -> bytes:
        # In a thread: a file may lie on a slow network.
        return await asyncio.to_thread(self._read, offset, size)

    def _read(self, offset: int, size: int) -> bytes:
        # Opened for each chunk: so nothing is left open, whenever the request ends.
        with open(self._path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
            if len(data) != size or _version(os.fstat(file.fileno())) != self._version:
                raise invalid(f"{self._path} changed while it was sent", "prompt")
        return data


def prompt_source(prompt: Prompt) -> PromptSource:
    """Raises ClientError for what is none, OSError for a file that cannot be read."""
    if isinstance(prompt, Path):
        return FilePrompt(prompt)
    if isinstance(prompt, str):
        return MemoryPrompt(memoryview(encode(prompt)), pb.PROMPT_KIND_TEXT)
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise invalid("a prompt of bytes could be text or ids: decode it, or make it an array('I')", "prompt")
    return MemoryPrompt(_id_bytes(prompt), pb.PROMPT_KIND_TOKEN_IDS)


def encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"the prompt holds half a surrogate pair at character {error.start}", "prompt") from None


def _id_bytes(ids: "Sequence[int] | array[int] | np.ndarray[Any, Any]") -> memoryview:
    if sys.byteorder == "little":
        try:
            view = memoryview(ids)  # type: ignore[arg-type]
        except TypeError:
            view = None
        if view is not None and view.format in ("I", "<I") and view.ndim == 1 and view.c_contiguous:
            return view.cast("B")
    try:
        copy = array("I", ids)
    except (TypeError, OverflowError) as error:
        raise invalid(f"a prompt is a path, a text, or token ids: {error}", "prompt") from None
    assert copy.itemsize == TOKEN_BYTES
    if sys.byteorder != "little":
        copy.byteswap()
    return memoryview(copy).cast("B")


def _version(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
