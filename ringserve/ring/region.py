"""The memory that the ranks of one host share, and what the parent process does with it.

    0       | magic | ring size | epoch | abort |                                                  one page
    4096    | pair 0 slot 0 | pair 0 slot 1 | pair 1 slot 0 | ...          control, 128 bytes per slot:
            |     +0  filled (u32), +8 header: the sender's cache line    how often the slot was filled
            |     +64 freed (u32): the receiver's cache line              how often it was emptied
    ...     | pair 0 slot 0 | pair 0 slot 1 | pair 1 slot 0 | ...         payloads, whole pages each

A pair is an ordered (source, destination). The region is one memfd: it has no name that could be left behind
or opened by others, is not bound by the size of /dev/shm (64 MB in many containers), and a page of it takes
memory only once it is written, so slots may be as large as the largest message ever.
"""

import ctypes
import mmap
import os
import platform
import struct
import sys
from typing import Final

from ringserve.errors import ConfigError
from ringserve.ring.futex import futex_wake

REGION_MAGIC: Final = 0x52455347
MAGIC_WORD, SIZE_WORD, EPOCH_WORD, ABORT_WORD = range(4)
"""Indices of the u32 words of the header page."""
ABORTED_BY_PARENT: Final = 1
ABORTED_BY_RANK: Final = 2
"""Values of the abort word: 0 while all is well; ABORTED_BY_RANK + r when rank r gave up."""

PAGE_BYTES: Final = 4096
SLOTS: Final = 2
_SLOT_CONTROL_BYTES: Final = 128
HEADER_OFFSET: Final = 8
FREED_OFFSET: Final = 64


def _pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


def pair_index(source: int, destination: int, ring_size: int) -> int:
    """Number of the ordered pair; a rank has none with itself."""
    assert source != destination, f"rank {source} sends to itself"
    return source * (ring_size - 1) + (destination - source - 1) % ring_size


def control_offset(pair: int, slot: int) -> int:
    """Where the control words of a slot stand."""
    return PAGE_BYTES + (SLOTS * pair + slot) * _SLOT_CONTROL_BYTES


def control_bytes(ring_size: int) -> int:
    """Size of the region up to the first payload."""
    return _pages(control_offset(ring_size * (ring_size - 1), 0))


def payload_offset(pair: int, slot: int, ring_size: int, slot_bytes: int) -> int:
    """Where the payload of a slot starts."""
    return control_bytes(ring_size) + (SLOTS * pair + slot) * _pages(slot_bytes)


def region_bytes(ring_size: int, slot_bytes: int) -> int:
    """Size of the whole region, if messages have at most `slot_bytes`. Most of it is never touched."""
    return payload_offset(ring_size * (ring_size - 1), 0, ring_size, slot_bytes)


def require_shared_memory_support() -> None:
    """Raise ConfigError where this transport cannot work, so that the caller picks another one.

    Filled and freed counters are plain stores that must not overtake the payload's. x86-64 keeps stores in
    order (total store order); other processors need barriers that Python cannot issue.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "AMD64"):
        raise ConfigError(f"the shared memory transport needs Linux on x86_64, this is {sys.platform} on "
                          f"{machine or 'an unknown processor'}: use --transport gloo")


def create_region(ring_size: int, epoch: int = 0) -> int:
    """A new region as a file descriptor for the rank processes to inherit (`pass_fds`).

    It has no payloads yet: once the largest message is known, the parent makes room for them with
    `os.ftruncate(fd, region_bytes(ring_size, slot_bytes))`, before any rank opens its transport.
    """
    require_shared_memory_support()
    fd = os.memfd_create("ringserve-ring")
    os.ftruncate(fd, control_bytes(ring_size))
    _write_header(fd, ring_size, epoch)
    return fd


def reset_region(fd: int, ring_size: int, slot_bytes: int, epoch: int) -> None:
    """Empty the region for a new epoch, perhaps of another size; what it held is freed.

    Only when no process of the old epoch can still write: the survivors have reported that they left the
    step, the others have been killed and reaped. All ranks then open new transports.
    """
    os.ftruncate(fd, 0)
    os.ftruncate(fd, region_bytes(ring_size, slot_bytes))
    _write_header(fd, ring_size, epoch)


def _write_header(fd: int, ring_size: int, epoch: int) -> None:
    os.pwrite(fd, struct.pack("<4I", REGION_MAGIC, ring_size, epoch, 0), 0)


def abort_region(fd: int) -> None:
    """Free every rank that waits: it gets RingAbortedError, and so does each later wait of this epoch."""
    magic, ring_size = struct.unpack("<2I", os.pread(fd, 8, 0))
    assert magic == REGION_MAGIC, f"file descriptor {fd} is no ring region"
    mapping = mmap.mmap(fd, control_bytes(ring_size))
    words = memoryview(mapping).cast("I")
    base = ctypes.c_char.from_buffer(mapping)
    abort_waits(words, ctypes.addressof(base), ring_size, ABORTED_BY_PARENT)
    words.release()
    del base
    mapping.close()


def abort_waits(words: memoryview, address: int, ring_size: int, reason: int) -> None:
    """Set the abort word and wake all who sleep on a slot; who falls asleep just now wakes a slice later."""
    words[ABORT_WORD] = words[ABORT_WORD] or reason
    for pair in range(ring_size * (ring_size - 1)):
        for slot in range(SLOTS):
            control = address + control_offset(pair, slot)
            futex_wake(control)
            futex_wake(control + FREED_OFFSET)
