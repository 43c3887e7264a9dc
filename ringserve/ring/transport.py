"""What moves bytes between ranks: the interface of a transport, and the header that frames each message.

A transport carries whole messages between ordered pairs of ranks, in order per pair, through two slots per
pair: `slot` gives the buffer to fill for the next message, `post` sends it (and expects the message that
comes in), `wait` returns what came in, `release` gives its slot back. One transport lives for one epoch: when
the ring is re-formed, a new one is made.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from ringserve.errors import EngineError

MAGIC: Final = 0x474E4952  # "RING"
_HEADER: Final = struct.Struct("<IIQIQI")  # magic, epoch, step, sequence, payload length, CRC32
HEADER_BYTES: Final = 64
"""Room for a header before a payload: more than it needs, so that the payload is aligned to a cache line."""
_FIELDS: Final = ("magic", "epoch", "step", "sequence", "length")


class RingProtocolError(EngineError):
    """A message is not the one that was due: another step, sequence or length, or its bytes are damaged."""

    code = "ring_protocol"


class RingAbortedError(EngineError):
    """The ring was given up: by the engine, by a rank that failed, or because a peer is gone."""

    code = "ring_aborted"


@dataclass(slots=True, eq=False)  # two exchanges are never the same one
class Exchange:
    """One message out and one message in, either of which may be absent (0 bytes)."""

    destination: int
    send_bytes: int
    source: int
    receive_bytes: int
    sequence: int = -1
    """Number of the incoming message in its pair; the transport sets it in `post`."""
    message: Tensor | None = None
    """What came in, once `wait` has returned."""


class Transport(Protocol):
    """Moves framed messages between the ranks of one epoch. Used by one thread."""

    rank: int
    size: int
    epoch: int
    device: torch.device

    def begin_step(self, step: int) -> None:
        """The messages that follow belong to `step`."""
        ...

    def slot(self, destination: int, n_bytes: int) -> Tensor:
        """A uint8 buffer [n_bytes] for the next message to `destination`; waits until its slot is free."""
        ...

    def post(self, exchange: Exchange) -> None:
        """Send what stands in the slot (if `send_bytes`) and expect a message (if `receive_bytes`)."""
        ...

    def wait(self, exchange: Exchange) -> Tensor:
        """The message of `exchange`, verified: uint8 [receive_bytes] with receive_bytes > 0."""
        ...

    def release(self, exchange: Exchange) -> None:
        """The message of `exchange` has been read; its slot may be written again."""
        ...

    def abort(self) -> None:
        """This rank gives the ring up: free the peers that wait for it."""
        ...

    def close(self) -> None:
        """Let go of buffers and connections. Nothing may be in use any more."""
        ...


class Framing:
    """Writes and verifies the headers of one rank's messages in one epoch.

    `sequence` counts the messages of an ordered pair since the epoch began, so a message that is lost,
    doubled or left over from a step that failed never passes for the next one.
    """

    def __init__(self, rank: int, epoch: int, checksums: bool) -> None:
        self.rank = rank
        self.epoch = epoch
        self.checksums = checksums
        self.step = -1

    def begin_step(self, step: int) -> None:
        assert step >= 0, f"step numbers start at 0, got {step}"
        self.step = step

    def write(self, buffer: memoryview, offset: int, sequence: int, payload: Tensor) -> None:
        """Put the header of `payload` at `offset` of `buffer`."""
        assert self.step >= 0, f"rank {self.rank} posts a message before its first step began"
        checksum = payload_checksum(payload) if self.checksums else 0
        _HEADER.pack_into(buffer, offset, MAGIC, self.epoch, self.step, sequence, payload.numel(), checksum)

    def verify(self, buffer: memoryview, offset: int, source: int, sequence: int, payload: Tensor) -> None:
        """Raise RingProtocolError unless the header at `offset` of `buffer` is the one due for `payload`."""
        *found, checksum = _HEADER.unpack_from(buffer, offset)
        due = [MAGIC, self.epoch, self.step, sequence, payload.numel()]
        if found != due:
            wrong = ", ".join(f"{name} {have:#x} instead of {want:#x}" if name == "magic"
                              else f"{name} {have} instead of {want}"
                              for name, have, want in zip(_FIELDS, found, due) if have != want)
            raise RingProtocolError(f"rank {self.rank} got a wrong message from rank {source}: {wrong} "
                                    f"(step {self.step}, message {sequence})")
        if self.checksums and checksum != (computed := payload_checksum(payload)):
            raise RingProtocolError(
                f"rank {self.rank} got damaged bytes from rank {source}: CRC32 {computed:#010x} instead of "
                f"{checksum:#010x} over {payload.numel()} bytes (step {self.step}, message {sequence})")


def payload_checksum(payload: Tensor) -> int:
    """CRC32 of a uint8 tensor's bytes; a tensor on a device is copied to the host for it."""
    return zlib.crc32(host_bytes(payload.cpu()))


def host_bytes(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor of the host, without a copy."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # an array is a buffer, its type says so from 3.12
