"""The process that prepares large prompts: `python -m ringserve_api.prompt_worker FD`.

It reads length-prefixed msgpack frames from the socket FD: one Start, then Jobs, and answers each Job with a
Reply. It ends when the socket closes. A thread in the server would not do: parsing 7 MB of JSON holds the
interpreter for 90 ms, and tokenizing it for seconds.

A frame is a little-endian u32 length and that many bytes.
"""

import logging
import signal
import socket
import struct
import sys

import msgspec

from ringserve_api.engine_port import ServedModel, Tokenizer, TokenizerRecipe
from ringserve_api.errors import WireError, is_expected, wire_error
from ringserve_api.prepare import Kind, Prepared, little_endian, prepare

HEADER = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, kw_only=True):
    model: ServedModel
    tokenizer: TokenizerRecipe


class PrepareBody(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The body of a request, or the same thing made of a message."""

    kind: Kind | None
    body: bytes
    tenant: str


class EncodePart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The next part of a text that comes in pieces."""

    text: str
    final: bool
    tenant: str


class EncodeWhole(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All of that text at once."""

    text: str


Job = PrepareBody | EncodePart | EncodeWhole


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    token_ids: bytes
    """Little-endian u32."""
    characters: int
    """Of the text that these are the ids of: what follows may change the rest."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    error: WireError


Reply = Prepared | Encoded | Failed


def _read_exactly(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return data


def _read_frame(sock: socket.socket) -> bytearray:
    (length,) = HEADER.unpack(_read_exactly(sock, HEADER.size))
    return _read_exactly(sock, length)


def _done(job: Job, tokenizer: Tokenizer, model: ServedModel) -> Prepared | Encoded:
    if isinstance(job, PrepareBody):
        return prepare(job.kind, job.body, tokenizer, model, job.tenant)
    if isinstance(job, EncodePart):
        ids, characters = tokenizer.encode_part(job.text, final=job.final, tenant=job.tenant)
    else:
        ids, characters = tokenizer.encode_at_once(job.text), len(job.text)
    return Encoded(token_ids=little_endian(ids), characters=characters)


def serve(sock: socket.socket) -> None:
    """Answer jobs until the other end closes."""
    start = msgspec.msgpack.decode(_read_frame(sock), type=Start)
    tokenizer = start.tokenizer.load()
    decoder: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
    encoder = msgspec.msgpack.Encoder()
    while True:
        job = decoder.decode(_read_frame(sock))
        try:
            reply: Reply = _done(job, tokenizer, start.model)
        except Exception as error:
            if not is_expected(error):
                logging.exception("preparing a prompt failed")
            reply = Failed(error=wire_error(error))
        frame = encoder.encode(reply)
        sock.sendall(HEADER.pack(len(frame)))
        sock.sendall(frame)


def main() -> None:
    # The server decides when this ends: Ctrl+C in a terminal goes to the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        try:
            serve(sock)
        except (EOFError, ConnectionError):
            return


if __name__ == "__main__":
    main()
