"""Frames over a socket: a little-endian u32 length, then msgpack with a schema. Between our own processes only.

The sockets are pairs inherited by file descriptor: nothing listens, nobody else can connect.
"""

import logging
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
MAX_FRAME = 1 << 30

T = TypeVar("T")


def encode_frame(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    assert len(body) <= MAX_FRAME, f"a frame of {len(body)} bytes"
    return _LENGTH.pack(len(body)) + body


class ChannelClosedError(Exception):
    """The process at the other end is gone."""


class Channel(Generic[T]):
    """Sends any message, receives messages of the type `T`. One reader and one writer at a time."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    @classmethod
    def from_fd(cls, fd: int, receives: Any) -> "Channel[T]":
        return cls(socket.socket(fileno=fd), receives)

    def limit_stalls(self, seconds: float) -> None:
        """A message that the other process stops reading, or sending, in the middle counts as its end. Kept by the
        kernel, so threads that share the socket are not disturbed; also bounds the wait for a message to begin."""
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, limit)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        try:
            self._socket.sendall(encode_frame(message))
        except OSError as error:
            raise ChannelClosedError(str(error)) from None

    def receive(self, timeout_s: float | None = None) -> T:
        """The next message. Raises TimeoutError when none begins in time, ChannelClosedError at the end."""
        if timeout_s is not None and not self._begins(timeout_s):
            raise TimeoutError(f"no message within {timeout_s} s")
        try:
            head = self._read(_LENGTH.size)
            return self._decoder.decode(self._read(_LENGTH.unpack(head)[0]))
        except OSError as error:
            raise ChannelClosedError(str(error)) from None

    def _begins(self, timeout_s: float) -> bool:
        """Whether there is something to read in time. Reads nothing: half a frame taken would spoil the next."""
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        return bool(ready.poll(max(0.0, timeout_s) * 1000))

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise ChannelClosedError("closed by the other process")
            view = view[count:]
        return data

    def close(self) -> None:
        self._socket.close()


class Inbox(Generic[T]):
    """Reads a channel on a thread of its own, so that its end is seen while the process computes.

    `on_close` runs on that thread the moment the other process is gone.
    """

    def __init__(self, channel: Channel[T], on_close: Callable[[], None]) -> None:
        self._channel, self._on_close = channel, on_close
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="inbox", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                self._queue.put(self._channel.receive())
        except ChannelClosedError:
            pass
        except Exception:
            logger.exception("the other process sent what cannot be read")
        finally:
            self._on_close()

    def get(self) -> T:
        """The next message; waits for it. The wait ends with the process when the other end closes."""
        return self._queue.get()

    def drain(self) -> list[T]:
        """What has arrived, without waiting."""
        messages = []
        while not self._queue.empty():
            messages.append(self._queue.get())
        return messages


def exit_now() -> None:
    """End the process at once, whatever its other threads compute."""
    os._exit(0)
