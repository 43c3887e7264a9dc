"""Upload: a prompt that comes in chunks, checked as it comes, and tokenized as far as nothing can change it."""

import asyncio
import codecs
import hashlib
import logging
from array import array

import google_crc32c

from ringserve.errors import ContextLengthError, InvalidValueError
from ringserve.v1 import inference_pb2 as pb
from ringserve_api.body import BodyReader
from ringserve_api.errors import ApiError
from ringserve_api.prepare import from_little_endian
from ringserve_api.worker_pool import PromptWorker

MAX_CHUNK = 1 << 20
"""Bytes."""
PART = 1 << 13
"""Bytes of text that are worth a trip to the prompt worker."""
MAX_TAIL = 64 << 20
"""Bytes of text that may wait for a place where it can be cut."""

logger = logging.getLogger("ringserve.api")


class Upload:
    """`add` each chunk, then `commit`; `ids` grows, and is complete after `finish`."""

    def __init__(self, kind: "pb.PromptKind", around: "tuple[array[int], array[int]]", worker: PromptWorker,
                 bodies: BodyReader, tenant: str, n_ctx: int, max_output_tokens: int) -> None:
        """`n_ctx`, `max_output_tokens`: what the prompt must fit."""
        self.received = 0
        """Bytes."""
        self.committed = asyncio.Event()
        self.grew = asyncio.Event()
        """Set whenever there are new ids."""
        self._is_text = kind == pb.PROMPT_KIND_TEXT
        self._before, self._after = around if self._is_text else (array("I"), array("I"))
        self.ids = array("I", self._before)
        self._worker, self._bodies, self._tenant = worker, bodies, tenant
        self._n_ctx, self._max_output_tokens = n_ctx, max_output_tokens
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = bytearray()
        """All of it, to be tokenized once more in one piece."""
        self._tokenized = 0
        """Bytes of it that are."""
        self._worth = PART
        self._tokenizing = asyncio.Lock()
        """The client of a chunk may be gone, and the next one here, before its chunk is tokenized."""
        self._held = 0
        self._over = False

    async def add(self, chunk: pb.PromptChunk) -> None:
        """Returns when the chunk has its place. Raises InvalidValueError, ContextLengthError or ApiError."""
        data = chunk.data
        if self._over:
            raise ApiError("cancelled", "the request has ended")
        if chunk.offset != self.received:
            raise InvalidValueError(f"the chunk begins at byte {chunk.offset}, but the next byte of the prompt is "
                                    f"{self.received}", "chunk.offset")
        if len(data) > MAX_CHUNK:
            raise ApiError("request_too_large", f"a chunk has at most {MAX_CHUNK} bytes, got {len(data)}", "chunk.data")
        if google_crc32c.value(data) != chunk.crc32c:
            raise ApiError("checksum_mismatch", f"the chunk at byte {chunk.offset} does not have the CRC-32C that it "
                           "was sent with", "chunk.crc32c")
        self._bodies.hold(len(data))
        self._held += len(data)
        if self._is_text:
            self._check_text(data)
            self._text += data
            self._count(data)
            # Whatever becomes of the client meanwhile: it comes back to a chunk that is whole.
            await asyncio.shield(self._tokenize())
        elif len(data) % 4:
            raise InvalidValueError(f"a chunk of token ids has 4 bytes for each, got {len(data)} bytes", "chunk.data")
        else:
            self._count(data)
            self._grow(from_little_endian(data))

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.received += len(data)

    def _check_text(self, data: bytes, final: bool = False) -> None:
        try:
            self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise InvalidValueError(f"the prompt is not UTF-8: {error.reason} near byte {self.received + error.start}",
                                    "chunk.data") from None

    async def _tokenize(self, final: bool = False) -> None:
        """What can be, when it is worth it."""
        async with self._tokenizing:
            if len(self._text) - self._tokenized < self._worth and not final:
                return
            tail, _ = codecs.utf_8_decode(self._text[self._tokenized:], "strict", final)
            ids, cut = await self._worker.encode_part(tail, final=final, tenant=self._tenant)
            self._tokenized += len(tail[:cut].encode())
            waiting = len(self._text) - self._tokenized
            if waiting > MAX_TAIL:
                raise ApiError("request_too_large", f"more than {MAX_TAIL} bytes without a place to cut", "chunk.data")
            # A text that cannot be cut is not looked through again and again.
            self._worth = max(PART, 2 * waiting)
            self._grow(ids + self._after if final else ids)

    def _grow(self, ids: "array[int]") -> None:
        self.ids.extend(ids)
        if len(self.ids) + self._max_output_tokens > self._n_ctx:
            raise ContextLengthError(len(self.ids), self._max_output_tokens, self._n_ctx)
        self.grew.set()

    def commit(self, commit: pb.Commit) -> None:
        """The prompt is whole. Raises InvalidValueError or ApiError when it is not what was sent."""
        if commit.total_bytes != self.received:
            raise InvalidValueError(f"the prompt has {commit.total_bytes} bytes, of which {self.received} have come",
                                    "commit.total_bytes")
        if commit.sha256 != self._hash.digest():
            raise ApiError("checksum_mismatch", "the prompt does not have the SHA-256 that it was sent with",
                           "commit.sha256")
        if not self.received:
            raise InvalidValueError("the prompt is empty", "prompt")
        self._check_text(b"", final=True)
        self.committed.set()

    async def finish(self) -> None:
        """Tokenize the rest."""
        if self._is_text:
            await self._tokenize(final=True)

    async def tokenized_at_once(self) -> "array[int] | None":
        """The ids of the whole text, when they are not those of its parts."""
        whole = await self._worker.encode_at_once(self._text.decode()) if self._is_text else self.ids
        self._let_go()
        if whole == self.ids:
            return None
        logger.error("a text of %d bytes has other tokens in parts than at once; the latter are used", self.received)
        return whole

    def release(self) -> None:
        """Nothing more comes, and nothing of the prompt is held any longer."""
        self._over = True
        self.ids = array("I")
        self._let_go()

    def _let_go(self) -> None:
        self._bodies.let_go(self._held)
        self._held = 0
        self._text = bytearray()
