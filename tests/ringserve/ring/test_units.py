"""The parts that need no second process: the region's layout, the header, the ring of one rank."""

import itertools
import os
import platform

import pytest
import torch
from torch import Tensor

from ringserve.errors import ConfigError, EngineError
from ringserve.ring.group import RingGroup
from ringserve.ring.region import (
    PAGE_BYTES,
    control_bytes,
    control_offset,
    pair_index,
    payload_offset,
)
from ringserve.ring.shared_memory import SharedMemoryTransport, create_region, region_bytes
from ringserve.ring.staging import StagingBuffers
from ringserve.ring.transport import HEADER_BYTES, Framing, RingAbortedError, RingProtocolError


def unfilled(buffer: Tensor) -> None:
    raise AssertionError("nothing is to be filled")


def test_a_ring_of_one_rank_carries_nothing() -> None:
    ring = RingGroup(None)
    ring.begin_step(3, epoch=1)
    ticket = ring.post(0, 0, unfilled, 0)
    assert ring.wait(ticket).shape == (0,)
    ring.release(ticket)
    with pytest.raises(AssertionError, match="to itself"):
        ring.post(1, 5, unfilled, 5)
    assert ring.statistics().sent_bytes == (0,)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_slots_of_the_region_do_not_overlap(size: int) -> None:
    slot_bytes = 5000
    pairs = [pair_index(*ranks, size) for ranks in itertools.permutations(range(size), 2)]
    assert sorted(pairs) == list(range(size * (size - 1)))
    controls = sorted(control_offset(pair, slot) for pair in pairs for slot in range(2))
    assert all(after - before >= 128 for before, after in itertools.pairwise(controls))
    assert controls[0] >= PAGE_BYTES and controls[-1] + 128 <= control_bytes(size)
    payloads = sorted(payload_offset(pair, slot, size, slot_bytes) for pair in pairs for slot in range(2))
    assert all(after - before >= slot_bytes for before, after in itertools.pairwise(payloads))
    assert payloads[0] >= control_bytes(size) and payloads[-1] + slot_bytes <= region_bytes(size, slot_bytes)
    assert all(offset % PAGE_BYTES == 0 for offset in payloads)


def test_slots_that_are_not_used_take_no_memory() -> None:
    fd = create_region(4)
    try:
        os.ftruncate(fd, region_bytes(4, 1 << 32))
        transport = SharedMemoryTransport(fd, rank=0, size=4, slot_bytes=1 << 32, epoch=0, timeout_s=1.0)
        transport.begin_step(0)
        transport.slot(1, 1 << 31).view(torch.bfloat16)[:100].fill_(1.0)
        assert os.fstat(fd).st_blocks * 512 < 100 * PAGE_BYTES
        transport.close()
    finally:
        os.close(fd)


def test_a_transport_refuses_a_region_of_another_shape_or_epoch() -> None:
    fd = create_region(2, epoch=5)
    try:
        with pytest.raises(RingProtocolError, match="slots of 64 bytes need"):
            SharedMemoryTransport(fd, rank=0, size=2, slot_bytes=64, epoch=5, timeout_s=1.0)
        os.ftruncate(fd, region_bytes(2, 64))
        with pytest.raises(RingProtocolError, match="wants epoch 6 of 2"):
            SharedMemoryTransport(fd, rank=0, size=2, slot_bytes=64, epoch=6, timeout_s=1.0)
        transport = SharedMemoryTransport(fd, rank=0, size=2, slot_bytes=64, epoch=5, timeout_s=1.0)
        with pytest.raises(RingProtocolError, match="step 1 of epoch 6"):
            RingGroup(transport).begin_step(1, epoch=6)
        transport.close()
    finally:
        os.close(fd)


def test_other_processors_are_told_to_use_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match=r"x86_64.*aarch64.*gloo"):
        create_region(2)


def test_a_header_is_good_for_one_message_only() -> None:
    sender, receiver = Framing(0, epoch=2, checksums=True), Framing(1, epoch=2, checksums=True)
    buffer = memoryview(bytearray(HEADER_BYTES))
    payload = torch.arange(100, dtype=torch.uint8)
    for framing in (sender, receiver):
        framing.begin_step(2**40)
    sender.write(buffer, 8, 7, payload)
    receiver.verify(buffer, 8, 0, 7, payload)
    with pytest.raises(RingProtocolError, match="sequence 7 instead of 8"):
        receiver.verify(buffer, 8, 0, 8, payload)
    with pytest.raises(RingProtocolError, match="length 100 instead of 99"):
        receiver.verify(buffer, 8, 0, 7, payload[:99])
    with pytest.raises(RingProtocolError, match="CRC32"):
        receiver.verify(buffer, 8, 0, 7, payload + 1)
    receiver.begin_step(3)
    with pytest.raises(RingProtocolError, match=f"step {2**40} instead of 3"):
        receiver.verify(buffer, 8, 0, 7, payload)


def test_errors_of_the_ring_are_the_engines() -> None:
    assert issubclass(RingProtocolError, EngineError) and issubclass(RingAbortedError, EngineError)


def test_staging_buffers_are_allocated_once_per_size_class() -> None:
    buffers = StagingBuffers(torch.device("cpu"))
    first = buffers.take(1, 0, 1000)
    assert first.numel() == HEADER_BYTES + 1000
    assert buffers.take(1, 2, 1024).data_ptr() == first.data_ptr()
    assert buffers.take(1, 1, 1000).data_ptr() != first.data_ptr()
    assert buffers.take(2, 0, 1000).data_ptr() != first.data_ptr()
    larger = buffers.take(1, 4, 1025)
    assert buffers.take(1, 6, 2048).data_ptr() == buffers.take(1, 8, 1).data_ptr() == larger.data_ptr()
