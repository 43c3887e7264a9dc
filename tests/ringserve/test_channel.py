"""Frames between our own processes: whole or not at all, and an end that is always noticed."""

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringserve.channel import Channel, ChannelClosedError, Inbox, encode_frame
from ringserve.plan import RankOutput, RankTimes
from ringserve.rank_messages import FromRank, RankFailed

WAIT_S = 5.0


class Note(msgspec.Struct, frozen=True, tag=True):
    number: int
    data: bytes = b""


class Pair:
    """Both ends of a channel in one process."""

    def __init__(self) -> None:
        self.here, self.there = socket.socketpair()
        self.sender: Channel[Note] = Channel(self.here, Note)
        self.receiver: Channel[Note] = Channel(self.there, Note)

    def close(self) -> None:
        self.here.close()
        self.there.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = Pair()
    yield ends
    ends.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.builds(Note, st.integers(0, 2**40), st.binary(max_size=3000)), max_size=8))
def test_messages_arrive_whole_and_in_order(notes: list[Note]) -> None:
    pair = Pair()
    for note in notes:
        pair.sender.send(note)
    assert [pair.receiver.receive(WAIT_S) for _ in notes] == notes
    pair.close()


def test_a_frame_larger_than_the_socket_buffer(pair: Pair) -> None:
    note = Note(1, bytes(range(256)) * 40_000)
    writer = threading.Thread(target=pair.sender.send, args=[note])
    writer.start()
    assert pair.receiver.receive(WAIT_S) == note
    writer.join(WAIT_S)


def test_both_directions_are_independent(pair: Pair) -> None:
    pair.sender.send(Note(1))
    pair.receiver.send(Note(2))
    assert pair.sender.receive(WAIT_S).number == 2
    assert pair.receiver.receive(WAIT_S).number == 1


def test_a_union_of_messages_comes_back_as_the_right_one() -> None:
    here, there = socket.socketpair()
    channel: Channel[FromRank] = Channel(there, FromRank)
    report = RankOutput(step=1, rank=0, sampled=[], times=RankTimes(total=1.0, attention=0.5, packing=0.2, wait=0.1),
                        bytes_sent=[0, 5], peak_rss_bytes=7)
    for message in (report, RankFailed(rank=1, kind="OSError", message="gone")):
        Channel[FromRank](here, FromRank).send(message)
        assert channel.receive(WAIT_S) == message
    here.close()
    there.close()


@pytest.mark.parametrize("timeout_s", [0.0, 0.02, -1.0])
def test_nothing_in_time_is_a_time_out_and_the_channel_lives_on(pair: Pair, timeout_s: float) -> None:
    with pytest.raises(TimeoutError):
        pair.receiver.receive(timeout_s)
    pair.sender.send(Note(3))
    assert pair.receiver.receive(timeout_s).number == 3


def test_a_time_out_takes_no_part_of_a_frame(pair: Pair) -> None:
    frame = encode_frame(Note(4, b"x" * 50))
    pair.here.sendall(frame[:2])

    def rest() -> None:
        with pytest.raises(TimeoutError):
            Channel[Note](pair.here, Note).receive(0.05)
        pair.here.sendall(frame[2:])

    writer = threading.Thread(target=rest)
    writer.start()
    assert pair.receiver.receive(0.01).number == 4
    writer.join(WAIT_S)


def test_a_receiver_with_a_time_out_does_not_hurry_the_sender(pair: Pair) -> None:
    """Both use one socket: the reader's patience must not become the writer's."""
    big = Note(1, bytes(4_000_000))
    writer = threading.Thread(target=pair.receiver.send, args=[big])
    writer.start()
    with pytest.raises(TimeoutError):
        pair.receiver.receive(0.05)
    assert pair.sender.receive(WAIT_S) == big
    writer.join(WAIT_S)
    assert not writer.is_alive()


def test_a_closed_peer_is_noticed_when_receiving(pair: Pair) -> None:
    pair.sender.send(Note(1))
    pair.sender.close()
    assert pair.receiver.receive(WAIT_S).number == 1
    with pytest.raises(ChannelClosedError):
        pair.receiver.receive(WAIT_S)
    with pytest.raises(ChannelClosedError):
        pair.receiver.receive()


def test_a_closed_peer_is_noticed_in_the_middle_of_a_frame(pair: Pair) -> None:
    pair.here.sendall(encode_frame(Note(1, b"y" * 100))[:20])
    pair.sender.close()
    with pytest.raises(ChannelClosedError):
        pair.receiver.receive(WAIT_S)


def test_a_closed_peer_is_noticed_when_sending(pair: Pair) -> None:
    pair.receiver.close()
    with pytest.raises(ChannelClosedError):
        pair.sender.send(Note(1))


def test_an_inbox_reads_while_nobody_asks(pair: Pair) -> None:
    closed = threading.Event()
    inbox = Inbox(pair.receiver, closed.set)
    for number in range(3):
        pair.sender.send(Note(number))
    assert inbox.get().number == 0
    pair.sender.close()
    assert closed.wait(WAIT_S)
    assert [note.number for note in inbox.drain()] == [1, 2]
    assert inbox.drain() == []


def test_an_inbox_says_at_once_that_the_other_end_is_gone(pair: Pair) -> None:
    closed = threading.Event()
    Inbox(pair.receiver, closed.set)
    assert not closed.is_set()
    pair.sender.close()
    assert closed.wait(WAIT_S)


def test_an_inbox_ends_at_bytes_that_make_no_message(pair: Pair) -> None:
    closed = threading.Event()
    Inbox(pair.receiver, closed.set)
    pair.here.sendall(b"\x03\x00\x00\x00\xff\xff\xff")
    assert closed.wait(WAIT_S)
