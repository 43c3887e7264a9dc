"""A ring that goes wrong ends with the right error, soon, and never with the wrong bytes."""

import os
import struct
import time

import pytest

from ringserve.ring.region import HEADER_OFFSET, control_offset, pair_index, payload_offset
from ringserve.ring.shared_memory import abort_region
from tests.ringserve.ring.conftest import Operation, Ring, RingProcesses

SLOT_BYTES = 1 << 16


def flip(ring: Ring, offset: int) -> None:
    """Damage one byte of the shared region."""
    (byte,) = os.pread(ring.region_fd, 1, offset)
    os.pwrite(ring.region_fd, bytes([byte ^ 0x10]), offset)


def test_a_peer_that_never_sends_is_named(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 3, timeout_s=0.4)
    error = ring.run(2, ["post", "a", 1, 0, 10], ["wait", "a", 10])[-1]
    assert error["error"] == "RingTimeoutError"
    assert "rank 1 did not send message 0 to rank 2 within 0.4 s" in error["message"]
    assert 0.4 <= error["seconds"] < 0.9


def test_a_peer_that_never_reads_is_named(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2, timeout_s=0.4)
    rounds: list[Operation] = [["post", "a", 1, 10, 0], ["release", "a"]]
    error = ring.run(0, *rounds, *rounds, *rounds)[-1]
    assert error["error"] == "RingTimeoutError"
    assert "rank 1 did not take message 0 of rank 0 within 0.4 s" in error["message"]


@pytest.mark.parametrize("size", [2, 4])
def test_abort_by_the_parent_frees_all_waiting_ranks(ring_processes: RingProcesses, size: int) -> None:
    ring = ring_processes.form("shm", size)
    for rank in range(size):
        ring.ask(rank, ["post", "a", 1, 0, 10], ["wait", "a", 10])
    time.sleep(0.1)
    aborted = time.monotonic()
    abort_region(ring.region_fd)
    errors = [ring.answer(rank)[-1] for rank in range(size)]
    assert time.monotonic() - aborted < 0.3
    assert {error["error"] for error in errors} == {"RingAbortedError"}
    assert "the engine aborted the ring" in errors[0]["message"]
    # It stays aborted until the ring is formed anew.
    assert ring.run(0, ["post", "b", 1, 10, 0])[-1]["error"] == "RingAbortedError"
    assert ring_processes.form("shm", size).run_all(
        ["post", "a", 1, 10, 10], ["wait", "a", 10], ["release", "a"]) == [[None, 0, None]] * size


def test_a_rank_that_gives_up_frees_its_peers(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2)
    ring.ask(1, ["post", "a", 1, 0, 10], ["wait", "a", 10])
    time.sleep(0.05)
    started = time.monotonic()
    ring.run(0, ["abort"])
    assert ring.answer(1)[-1]["error"] == "RingAbortedError"
    assert time.monotonic() - started < 0.5


def test_survivors_of_a_killed_rank_come_free(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 4)
    ring.ask(3, ["kill_self_after", 0.1], ["post", "a", 1, 0, 10], ["wait", "a", 10])
    ring.ask(0, ["post", "a", 1, 0, 10], ["wait", "a", 10])
    assert ring.ranks[3].process.wait(5) == -9
    killed = time.monotonic()
    if transport == "shm":
        abort_region(ring.region_fd)
    assert ring.answer(0)[-1]["error"] == "RingAbortedError"
    assert time.monotonic() - killed < 0.3
    ring_processes.replace(3)
    survivors = ring_processes.form(transport, 3)
    exchange: list[Operation] = [["post", "a", 1, 1000, 1000], ["wait", "a", 1000], ["release", "a"]]
    assert survivors.run_all(*exchange) == [[None, 0, None]] * 3


def test_a_message_of_another_step_is_refused(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2)
    ring.run(0, ["begin", 8], ["post", "a", 1, 100, 0])
    error = ring.run(1, ["begin", 9], ["post", "a", 1, 0, 100], ["wait", "a", 100])[-1]
    assert error["error"] == "RingProtocolError"
    assert "step 8 instead of 9" in error["message"] and "from rank 0" in error["message"]


@pytest.mark.parametrize(("sent", "due"), [(100, 120), (120, 100)])
def test_a_message_of_another_length_is_refused(ring_processes: RingProcesses, transport: str, sent: int,
                                                due: int) -> None:
    ring = ring_processes.form(transport, 2)
    ring.run(0, ["post", "a", 1, sent, 0])
    error = ring.run(1, ["post", "a", 1, 0, due], ["wait", "a", due])[-1]
    assert error["error"] == "RingProtocolError"
    assert f"length {sent} instead of {due}" in error["message"]


def test_a_message_far_longer_than_due_does_not_end_a_gloo_process(ring_processes: RingProcesses) -> None:
    ring = ring_processes.form("gloo", 2, timeout_s=0.4)
    ring.run(0, ["post", "a", 1, 5000, 0])
    error = ring.run(1, ["post", "a", 1, 0, 100], ["wait", "a", 100])[-1]
    assert error["error"] == "RingTimeoutError"
    assert ring.run(1, ["statistics"])[0]["received_messages"] == 0


@pytest.mark.parametrize(("field", "name"),
                         [(0, "magic"), (4, "epoch"), (8, "step"), (16, "sequence"), (20, "length")])
def test_a_damaged_header_is_refused(ring_processes: RingProcesses, field: int, name: str) -> None:
    ring = ring_processes.form("shm", 2, slot_bytes=SLOT_BYTES)
    ring.run(0, ["post", "a", 1, 100, 0])
    flip(ring, control_offset(pair_index(0, 1, 2), 0) + HEADER_OFFSET + field)
    error = ring.run(1, ["post", "a", 1, 0, 100], ["wait", "a", 100])[-1]
    assert error["error"] == "RingProtocolError"
    assert f"{name} " in error["message"]


@pytest.mark.parametrize("checksums", [True, False])
def test_damaged_bytes_are_refused_with_checksums_on(ring_processes: RingProcesses, checksums: bool) -> None:
    ring = ring_processes.form("shm", 2, slot_bytes=SLOT_BYTES, checksums=checksums)
    ring.run(0, ["post", "a", 1, 100, 0])
    flip(ring, payload_offset(pair_index(0, 1, 2), 0, 2, SLOT_BYTES) + 99)
    result = ring.run(1, ["post", "a", 1, 0, 100], ["wait", "a", 100])[-1]
    if checksums:
        assert result["error"] == "RingProtocolError" and "CRC32" in result["message"]
    else:
        assert result == 1


def test_a_rank_of_a_past_epoch_leaves(ring_processes: RingProcesses) -> None:
    ring = ring_processes.form("shm", 2)
    ring.ask(1, ["post", "a", 1, 0, 10], ["wait", "a", 10])
    time.sleep(0.05)
    os.pwrite(ring.region_fd, struct.pack("<I", ring_processes.epoch + 1), 8)
    error = ring.answer(1)[-1]
    assert error["error"] == "RingAbortedError"
    assert f"the ring is in epoch {ring_processes.epoch + 1}" in error["message"]
    assert error["seconds"] < 0.3
