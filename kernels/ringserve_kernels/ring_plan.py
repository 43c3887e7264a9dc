"""RingPlan: what one rank attends, sends and receives in one step, for one layer group.

A pure function of where rows and keys are, the same on every rank, so that what r sends to s is what s expects:

    query exchanges   rows of pass-Q sequences go out, every rank computes partials against its own keys
    segment rounds    keys of pass-KV sequences go round in segments, the next in flight while one is computed
    returns           the partials of the query exchanges come home

Every exchange is a shift of the ring: rank r sends to r + h and hears from r - h. Messages go straight from the
rank that holds the keys to the rank that needs them: the same bytes as passing them on from neighbour to
neighbour, but a pair with nothing visible is skipped, and a hop never waits for somebody else's copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ringserve_kernels.attention_plan import (
    AttentionPlan,
    Ints,
    KeyBlocks,
    RowSpan,
    plan_attention,
)
from ringserve_kernels.merge import Rows


@dataclass(frozen=True, slots=True)
class RingSequence:
    """One sequence of the step as all ranks see it."""

    spans: list[RowSpan]
    """[ranks] its rows on each rank (`start` is the row in that rank's q)."""
    keys: list[KeyBlocks]
    """[ranks] its computed keys on each rank, those of this step included. `offset` is that rank's own."""
    pass_q: bool


@dataclass(frozen=True, slots=True)
class QueryExchange:
    shift: int
    send_rows: Rows
    """Own rows that go to rank + shift; their partials come back the same way."""
    send_count: int
    receive_count: int
    plan: AttentionPlan
    """The received rows against own keys."""


@dataclass(frozen=True, slots=True)
class SegmentExchange:
    shift: int
    send_runs: list[tuple[int, int]]
    """(offset, length) in the own storage, in message order."""
    send_count: int
    receive_count: int
    plan: AttentionPlan
    """Own rows against the received segment."""


@dataclass(frozen=True, slots=True)
class RingPlan:
    local: AttentionPlan
    queries: list[QueryExchange]
    segments: list[SegmentExchange]

    @property
    def is_empty(self) -> bool:
        return not (self.local.rows or self.queries or self.segments)


def plan_ring(rank: int, size: int, sequences: Sequence[RingSequence], window: int | None, segment: int,
              device: torch.device | None = None, granule: int = 1) -> RingPlan:
    """Plan one rank's part of a step. `segment` is the most tokens of keys in one message; a message carries each
    block filled up to a multiple of `granule` tokens, as its layout's granule wants it."""
    rows = sum(len(s.spans[rank].index) for s in sequences)
    local = plan_attention(rows, ((s.spans[rank], s.keys[rank]) for s in sequences), window, device)
    shifts = range(1, size)
    queries = [_query_exchange(rank, size, h, sequences, window, device) for h in shifts]
    outgoing = [_segments(rank, (rank + h) % size, sequences, window, segment, granule) for h in shifts]
    incoming = [_segments((rank - h) % size, rank, sequences, window, segment, granule) for h in shifts]
    segments = [
        _segment_exchange(h, _nth(outgoing[h - 1], i), _nth(incoming[h - 1], i), rows, rank, sequences, window, device,
                          granule)
        for i in range(max((len(part) for part in outgoing + incoming), default=0)) for h in shifts]
    return RingPlan(local, [q for q in queries if q.send_count or q.receive_count],
                    [s for s in segments if s.send_count or s.receive_count])


def _query_exchange(rank: int, size: int, shift: int, sequences: Sequence[RingSequence], window: int | None,
                    device: torch.device | None) -> QueryExchange:
    to, source = (rank + shift) % size, (rank - shift) % size
    sent = [s.spans[rank] for s in _travelling_queries(rank, to, sequences, window)]
    arrived: list[tuple[RowSpan, KeyBlocks]] = []
    count = 0
    for sequence in _travelling_queries(source, rank, sequences, window):
        index = sequence.spans[source].index
        arrived.append((RowSpan(count, index), sequence.keys[rank]))
        count += len(index)
    return QueryExchange(shift, _rows(sent, device), sum(len(s.index) for s in sent), count,
                         plan_attention(count, arrived, window, device))


def _travelling_queries(source: int, to: int, sequences: Sequence[RingSequence],
                        window: int | None) -> list[RingSequence]:
    """The pass-Q sequences of which `to` holds a key that a row on `source` may see."""
    return [s for s in sequences if s.pass_q and len(s.keys[to].in_reach(s.spans[source].index, window))]


def _rows(spans: list[RowSpan], device: torch.device | None) -> Rows:
    if len(spans) == 1:
        return slice(spans[0].start, spans[0].start + len(spans[0].index))
    parts = [np.arange(span.start, span.start + len(span.index)) for span in spans]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)).to(device)


_Piece = tuple[int, KeyBlocks]
"""(number of the sequence, blocks): part of a segment."""


def _filled(blocks: KeyBlocks, granule: int) -> Ints:
    """What each block takes in a message, in tokens."""
    return blocks.length if granule == 1 else -(-blocks.length // granule) * granule


def _segments(source: int, to: int, sequences: Sequence[RingSequence], window: int | None,
              segment: int, granule: int) -> list[list[_Piece]]:
    """What `source` sends to `to`, cut into messages of at most `segment` tokens."""
    messages: list[list[_Piece]] = []
    room = 0
    for number, sequence in enumerate(sequences):
        if sequence.pass_q:
            continue
        blocks = sequence.keys[source].in_reach(sequence.spans[to].index, window)
        while len(blocks):
            filled = _filled(blocks, granule)
            if room < filled[0]:
                messages.append([])
                room = max(segment, int(filled[0]))
            fits = int(np.searchsorted(np.cumsum(filled), room, side="right"))
            messages[-1].append((number, blocks.take(slice(0, fits))))
            room -= int(filled[:fits].sum())
            blocks = blocks.take(slice(fits, None))
    return messages


def _nth(messages: list[list[_Piece]], i: int) -> list[_Piece]:
    return messages[i] if i < len(messages) else []


def _segment_exchange(shift: int, sent: list[_Piece], received: list[_Piece], rows: int, rank: int,
                      sequences: Sequence[RingSequence], window: int | None,
                      device: torch.device | None, granule: int) -> SegmentExchange:
    """In the message, the received blocks lie one after the other: their offsets are their places in it."""
    arrived: list[tuple[RowSpan, KeyBlocks]] = []
    count = 0
    for number, blocks in received:
        filled = _filled(blocks, granule)
        ends = count + np.cumsum(filled)
        arrived.append((sequences[number].spans[rank], KeyBlocks(blocks.first, blocks.length, ends - filled)))
        count += int(filled.sum())
    whole = [KeyBlocks(blocks.first, _filled(blocks, granule), blocks.offset) for _, blocks in sent]
    return SegmentExchange(shift, [run for blocks in whole for run in blocks.runs()],
                           sum(blocks.tokens for blocks in whole), count,
                           plan_attention(rows, arrived, window, device))
