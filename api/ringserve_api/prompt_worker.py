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

from ringserve_api.engine_port import ServedModel, TokenizerRecipe
from ringserve_api.errors import WireError, is_expected, wire_error
from ringserve_api.prepare import Kind, Prepared, prepare

HEADER = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, kw_only=True):
    model: ServedModel
    tokenizer: TokenizerRecipe


class Job(msgspec.Struct, frozen=True, kw_only=True):
    kind: Kind | None
    body: bytes


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Either of the two."""

    prepared: Prepared | None = None
    error: WireError | None = None


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


def serve(sock: socket.socket) -> None:
    """Answer jobs until the other end closes."""
    start = msgspec.msgpack.decode(_read_frame(sock), type=Start)
    tokenizer = start.tokenizer.load()
    decoder, encoder = msgspec.msgpack.Decoder(Job), msgspec.msgpack.Encoder()
    while True:
        job = decoder.decode(_read_frame(sock))
        try:
            reply = Reply(prepared=prepare(job.kind, job.body, tokenizer, start.model))
        except Exception as error:
            if not is_expected(error):
                logging.exception("preparing a prompt failed")
            reply = Reply(error=wire_error(error))
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
