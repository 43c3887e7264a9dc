"""What r sends to s is what s receives, byte for byte, over every transport and ring size."""

import random

import pytest

from tests.ringserve.ring.conftest import Operation, RingProcesses


def random_plan(size: int, seed: int, n_exchanges: int = 24) -> tuple[list[int], list[list[int]]]:
    """Shifts and, per exchange, the bytes that each rank sends; a third of the messages are absent."""
    chance = random.Random(seed)
    shifts = [chance.randrange(1, size) for _ in range(n_exchanges)]
    sizes = [[0 if chance.random() < 0.33 else int(2 ** chance.uniform(0, 17)) for _ in range(size)]
             for _ in range(n_exchanges)]
    sizes[chance.randrange(n_exchanges)] = [chance.randrange(2 << 20, 4 << 20) for _ in range(size)]
    sizes[chance.randrange(n_exchanges)] = [1] * size
    sizes[chance.randrange(n_exchanges)] = [0] * size
    return shifts, sizes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_exchanges_arrive_byte_for_byte_and_are_counted(
        ring_processes: RingProcesses, transport: str, size: int) -> None:
    ring = ring_processes.form(transport, size, checksums=True)
    for step in range(4):
        shifts, sizes = random_plan(size, seed=100 * size + step)
        exchanges = ["exchanges", step, shifts, sizes, step % 2, [0.0]]
        results = ring.run_all(["begin", step], exchanges, ["statistics"])
        for rank, (_, wrong, statistics) in enumerate(results):
            assert wrong == 0
            sent, received = [0] * size, [0] * size
            for shift, n_bytes in zip(shifts, sizes):
                sent[(rank + shift) % size] += n_bytes[rank]
                received[(rank - shift) % size] += n_bytes[(rank - shift) % size]
            assert statistics["sent_bytes"] == sent
            assert statistics["received_bytes"] == received
            assert statistics["sent_messages"] == sum(n_bytes[rank] > 0 for n_bytes in sizes)
            assert statistics["received_messages"] == sum(
                n_bytes[(rank - shift) % size] > 0 for shift, n_bytes in zip(shifts, sizes))
            assert statistics["wait_s"] >= 0 and statistics["packing_s"] > 0


def test_a_slow_reader_never_sees_its_slot_overwritten(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2)
    shifts, sizes = [1] * 12, [[50_000 + k, 0] for k in range(12)]
    ring.ask(1, ["exchanges", 7, shifts, sizes, 1, [0.02, 0.0, 0.01]])
    ring.ask(0, ["exchanges", 7, shifts, sizes, 1, [0.0]], ["statistics"])
    _, statistics = ring.answer(0)
    assert ring.answer(1) == [0]
    assert statistics["wait_s"] > 0.05  # the sender was held back: 12 messages through two slots


def test_two_exchanges_may_be_released_in_either_order(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2)
    for turn in range(3):
        results = ring.run_all(["post", "a", 1, 100, 100, 1], ["post", "b", 1, 70_000, 70_000, 2],
                               ["wait", "b", 70_000, 2], ["release", "b"],
                               ["wait", "a", 100, 1], ["release", "a"])
        assert results == [[None, None, 0, None, 0, None]] * 2, turn


def test_the_largest_message_fills_a_slot_and_a_larger_one_fails(ring_processes: RingProcesses) -> None:
    ring = ring_processes.form("shm", 2, slot_bytes=5000)
    exchange: list[Operation] = [["post", "a", 1, 5000, 5000], ["wait", "a", 5000], ["release", "a"]]
    assert ring.run_all(*exchange, *exchange, *exchange) == [[None, 0, None] * 3] * 2
    error = ring.run(0, ["post", "b", 1, 5001, 0])[-1]
    assert error["error"] == "AssertionError"
    assert "5001" in error["message"] and "5000" in error["message"]


def test_a_third_open_exchange_is_refused(ring_processes: RingProcesses) -> None:
    ring = ring_processes.form("shm", 2)
    *_, error = ring.run(0, ["post", "a", 1, 8, 0], ["post", "b", 1, 8, 0], ["post", "c", 1, 8, 0])
    assert error["error"] == "AssertionError"


def test_gloo_listens_on_loopback_only_and_shared_memory_nowhere(ring_processes: RingProcesses,
                                                                 transport: str) -> None:
    ring = ring_processes.form(transport, 3)
    for (listeners,) in ring.run_all(["listeners"]):
        if transport == "gloo":
            assert listeners and set(listeners) == {"127.0.0.1"}
        else:
            assert listeners == []


def test_round_trips_are_not_slow(ring_processes: RingProcesses, transport: str) -> None:
    ring = ring_processes.form(transport, 2)
    seconds = max(trips for (trips,) in ring.run_all(["round_trips", 200, 1200])) / 200
    # About 16 us over shared memory and 100 us over gloo on idle cores. A lost wake-up takes 50 ms.
    assert seconds < 0.01, f"{seconds * 1e6:.0f} us per round trip"
