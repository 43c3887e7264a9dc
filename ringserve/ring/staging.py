"""Buffers that messages are packed into and received in, for transports that copy."""

import torch
from torch import Tensor

from ringserve.ring.transport import HEADER_BYTES

SLOTS = 2


def size_class(n_bytes: int) -> int:
    """The power of two that a message of `n_bytes` is rounded up to, as an exponent."""
    return (n_bytes - 1).bit_length()


class StagingBuffers:
    """Two buffers per peer, allocated when the first message of a larger size class comes, then kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def take(self, peer: int, sequence: int, n_bytes: int) -> Tensor:
        """Header and payload of message `sequence` with `peer`: uint8 [HEADER_BYTES + n_bytes]."""
        key = peer, sequence % SLOTS
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < HEADER_BYTES + n_bytes:
            room = HEADER_BYTES + 2 ** size_class(n_bytes)
            buffer = torch.empty(room, dtype=torch.uint8, device=self._device)
            self._buffers[key] = buffer
        return buffer[:HEADER_BYTES + n_bytes]
