"""What transports between CUDA devices share: who they are, and headers that are looked at with checksums only."""

import torch
from torch import Tensor

from ringserve.ring.transport import HEADER_BYTES, Framing, host_bytes

_U32 = 0xFFFFFFFF


class DeviceTransport:
    """Reading or writing a header stops the host until the device is done, so it is done with checksums on only.
    Without them the lengths are what both sides know from the plan."""

    def __init__(self, *, rank: int, size: int, epoch: int, device: torch.device, checksums: bool) -> None:
        self.rank = rank
        self.size = size
        self.epoch = epoch
        self.device = device
        self._checksums = checksums
        self._framing = Framing(rank, epoch, checksums)

    def begin_step(self, step: int) -> None:
        self._framing.begin_step(step)

    def _seal(self, packed: Tensor, sequence: int) -> None:
        """Write the header in front of a payload: `packed` is uint8 [HEADER_BYTES + n]."""
        if self._checksums:
            header = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
            self._framing.write(host_bytes(header), 0, sequence & _U32, packed[HEADER_BYTES:])
            packed[:HEADER_BYTES].copy_(header)

    def _opened(self, packed: Tensor, source: int, sequence: int) -> Tensor:
        """The payload, behind a header that is the due one."""
        if self._checksums:
            header = host_bytes(packed[:HEADER_BYTES].cpu())
            self._framing.verify(header, 0, source, sequence & _U32, packed[HEADER_BYTES:])
        return packed[HEADER_BYTES:]
