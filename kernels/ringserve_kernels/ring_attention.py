"""Attention over the ring: the loop that knows no transport, around the primitive that knows no ring.

Shape suffixes: T rows, H query heads, K kv heads, S keys, D head dim. The timetable of one layer on one rank,
with two query shifts and three segments (> posts, < waits for):

    >Q1 >S1  local  >Q2 <Q1 partials  <Q2 partials  >S2 <S1 attend  >S3 <S2 attend  <S3 attend  >R1 >R2 <R1 <R2
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringserve_kernels.attend import KeyValues, attend
from ringserve_kernels.merge import merge_rows, merge_sink
from ringserve_kernels.ring import Ring, Ticket
from ringserve_kernels.ring_plan import QueryExchange, RingPlan, SegmentExchange
from ringserve_kernels.spec import AttentionSpec

State = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Message:
    """One exchange as the ring sees it."""

    shift: int
    send_bytes: int
    fill: Callable[[Tensor], None]
    receive_bytes: int


def ring_attention(q_THD: Tensor, keys: KeyValues, plan: RingPlan, spec: AttentionSpec, ring: Ring,
                   sink_H: Tensor | None = None) -> Tensor:
    """Exact attention of this rank's rows over the keys of all ranks: o_THD in q's dtype.

    Every rank of the ring calls it for every layer, also one without rows (T = 0), whose keys others may need.
    The step's own keys must be in the cache already. Equivalent to `reference_attention` over the whole
    sequence. Ring attention: Liu et al. 2023 (2310.01889); pass-KV and pass-Q: Yang et al. 2024 (2411.01783).
    """
    queries = _Rounds(ring, [_query_message(q_THD, exchange, spec) for exchange in plan.queries])
    queries.post_next()
    state = attend(q_THD, keys, plan.local, spec)
    partials: list[State] = []
    for message, exchange in zip(queries, plan.queries):
        arrived = message.view(q_THD.dtype).view(spec.num_heads, exchange.receive_count, spec.key_dim)
        partials.append(attend(arrived.transpose(0, 1), keys, exchange.plan, spec))

    segments = _Rounds(ring, [_segment_message(keys, exchange, spec) for exchange in plan.segments])
    for message, segment in zip(segments, plan.segments):
        attend(q_THD, _segment_keys(message, segment.receive_count, keys, spec), segment.plan, spec, into=state)

    returns = _Rounds(ring, [_return_message(exchange, partial, spec)
                             for exchange, partial in zip(plan.queries, partials)])
    for message, exchange in zip(returns, plan.queries):
        if exchange.send_count:
            merge_rows(*state, exchange.send_rows, *_unpack(message, exchange.send_count, spec, state[0].dtype))
    o_THD, lse_TH = state
    if sink_H is not None:
        merge_sink(o_THD, lse_TH, sink_H)
    return o_THD.to(q_THD.dtype)


class _Rounds:
    """Exchanges in order, each posted before the one before it is waited for; iterates over what came in.

    A message is released when the next is asked for, so in `zip` the rounds stand first.
    """

    def __init__(self, ring: Ring, messages: list[_Message]) -> None:
        self._ring = ring
        self._messages = messages
        self._posted: list[Ticket] = []

    def post_next(self) -> None:
        if len(self._posted) < len(self._messages):
            m = self._messages[len(self._posted)]
            self._posted.append(self._ring.post(m.shift, m.send_bytes, m.fill, m.receive_bytes))

    def __iter__(self) -> Iterator[Tensor]:
        if not self._posted:
            self.post_next()
        for i in range(len(self._messages)):
            self.post_next()
            ticket = self._posted[i]
            yield self._ring.wait(ticket)
            self._ring.release(ticket)


def _query_message(q_THD: Tensor, exchange: QueryExchange, spec: AttentionSpec) -> _Message:
    def fill(buffer: Tensor) -> None:
        out = buffer.view(q_THD.dtype).view(spec.num_heads, exchange.send_count, spec.key_dim)
        out.copy_(q_THD[exchange.send_rows].transpose(0, 1))

    row_bytes = spec.num_heads * spec.key_dim * q_THD.element_size()
    return _Message(exchange.shift, exchange.send_count * row_bytes, fill, exchange.receive_count * row_bytes)


def _segment_message(keys: KeyValues, exchange: SegmentExchange, spec: AttentionSpec) -> _Message:
    def fill(buffer: Tensor) -> None:
        out = _segment_keys(buffer, exchange.send_count, keys, spec)
        place = 0
        for offset, length in exchange.send_runs:
            out.k_KPD[:, place:place + length] = keys.k_KPD[:, offset:offset + length]
            out.v_KPD[:, place:place + length] = keys.v_KPD[:, offset:offset + length]
            place += length

    key_bytes = spec.num_kv_heads * (spec.key_dim + spec.value_dim) * keys.k_KPD.element_size()
    return _Message(exchange.shift, exchange.send_count * key_bytes, fill, exchange.receive_count * key_bytes)


def _segment_keys(buffer: Tensor, count: int, like: KeyValues, spec: AttentionSpec) -> KeyValues:
    """A message as keys and values: all of K, then all of V, head-major."""
    flat = buffer.view(like.k_KPD.dtype)
    cut = spec.num_kv_heads * count * spec.key_dim
    return KeyValues(flat[:cut].view(spec.num_kv_heads, count, spec.key_dim),
                     flat[cut:].view(spec.num_kv_heads, count, spec.value_dim))


def _return_message(exchange: QueryExchange, partial: State, spec: AttentionSpec) -> _Message:
    """Partials go back whence the rows came: rank - shift, so this is a shift by -shift."""
    o_THD, lse_TH = partial

    def fill(buffer: Tensor) -> None:
        out_o, out_lse = _unpack(buffer, exchange.receive_count, spec, o_THD.dtype)
        out_o.copy_(o_THD)
        out_lse.copy_(lse_TH)

    row_bytes = spec.num_heads * (spec.value_dim + 1) * o_THD.element_size()
    return _Message(-exchange.shift, exchange.receive_count * row_bytes, fill, exchange.send_count * row_bytes)


def _unpack(buffer: Tensor, count: int, spec: AttentionSpec, dtype: torch.dtype) -> State:
    """A message as (o_THD, lse_TH): all of o, then all of lse, head-major."""
    flat = buffer.view(dtype)
    cut = spec.num_heads * count * spec.value_dim
    return (flat[:cut].view(spec.num_heads, count, spec.value_dim).transpose(0, 1),
            flat[cut:].view(spec.num_heads, count).transpose(0, 1))
