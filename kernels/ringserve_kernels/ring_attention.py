"""Attention over the ring: the loop that knows no transport, around the primitive that knows no ring.

Shape suffixes: T rows, H query heads, K kv heads, S keys, D head dim. The timetable of one layer on one rank,
with two query shifts and three segments (> posts, < waits for):

    >Q1 >S1  local  >Q2 <Q1 partials  <Q2 partials  >S2 <S1 attend  >S3 <S2 attend  <S3 attend  >R1 >R2 <R1 <R2
"""

import torch
from torch import Tensor

from ringserve_kernels.attend import attend
from ringserve_kernels.key_values import KeyValues
from ringserve_kernels.merge import State, merge_rows, merge_sink
from ringserve_kernels.ring import Ring
from ringserve_kernels.ring_plan import QueryExchange, RingPlan, SegmentExchange
from ringserve_kernels.rounds import Message, Rounds
from ringserve_kernels.spec import AttentionSpec


def ring_attention(q_THD: Tensor, keys: KeyValues, plan: RingPlan, spec: AttentionSpec, ring: Ring,
                   sink_H: Tensor | None = None) -> Tensor:
    """Exact attention of this rank's rows over the keys of all ranks: o_THD in q's dtype.

    Every rank of the ring calls it for every layer, also one without rows (T = 0), whose keys others may need.
    The step's own keys must be in the cache already. Equivalent to `reference_attention` over the whole
    sequence. Ring attention: Liu et al. 2023 (2310.01889); pass-KV and pass-Q: Yang et al. 2024 (2411.01783).
    """
    queries = Rounds(ring, [_query_message(q_THD, exchange, spec) for exchange in plan.queries])
    queries.post_next()
    state = attend(q_THD, keys, plan.local, spec)
    partials: list[State] = []
    for message, exchange in zip(queries, plan.queries):
        arrived = message.view(q_THD.dtype).view(spec.num_heads, exchange.receive_count, spec.key_dim)
        partials.append(attend(arrived.transpose(0, 1), keys, exchange.plan, spec))

    segments = Rounds(ring, [_segment_message(keys, exchange) for exchange in plan.segments])
    for message, segment in zip(segments, plan.segments):
        attend(q_THD, keys.laid_over(message), segment.plan, spec, into=state)

    returns = Rounds(ring, [_return_message(exchange, partial, spec)
                            for exchange, partial in zip(plan.queries, partials)])
    for message, exchange in zip(returns, plan.queries):
        if exchange.send_count:
            merge_rows(*state, exchange.send_rows, *_unpack(message, exchange.send_count, spec, state[0].dtype))
    o_THD, lse_TH = state
    if sink_H is not None:
        merge_sink(o_THD, lse_TH, sink_H)
    return o_THD.to(q_THD.dtype)


def _query_message(q_THD: Tensor, exchange: QueryExchange, spec: AttentionSpec) -> Message:
    def fill(buffer: Tensor) -> None:
        out = buffer.view(q_THD.dtype).view(spec.num_heads, exchange.send_count, spec.key_dim)
        out.copy_(q_THD[exchange.send_rows].transpose(0, 1))

    row_bytes = spec.num_heads * spec.key_dim * q_THD.element_size()
    return Message(exchange.shift, exchange.send_count * row_bytes, fill, exchange.receive_count * row_bytes)


def _segment_message(keys: KeyValues, exchange: SegmentExchange) -> Message:
    def fill(buffer: Tensor) -> None:
        parts = list(zip(keys.laid_over(buffer).parts, keys.parts))
        place = 0
        for offset, length in exchange.send_runs:
            for out_KPD, own_KPD in parts:
                out_KPD[:, place:place + length] = own_KPD[:, offset:offset + length]
            place += length

    return Message(exchange.shift, exchange.send_count * keys.token_bytes, fill,
                   exchange.receive_count * keys.token_bytes)


def _return_message(exchange: QueryExchange, partial: State, spec: AttentionSpec) -> Message:
    """Partials go back whence the rows came: rank - shift, so this is a shift by -shift."""
    o_THD, lse_TH = partial

    def fill(buffer: Tensor) -> None:
        out_o, out_lse = _unpack(buffer, exchange.receive_count, spec, o_THD.dtype)
        out_o.copy_(o_THD)
        out_lse.copy_(lse_TH)

    row_bytes = spec.num_heads * (spec.value_dim + 1) * o_THD.element_size()
    return Message(-exchange.shift, exchange.receive_count * row_bytes, fill, exchange.send_count * row_bytes)


def _unpack(buffer: Tensor, count: int, spec: AttentionSpec, dtype: torch.dtype) -> State:
    """A message as (o_THD, lse_TH): all of o, then all of lse, head-major."""
    flat = buffer.view(dtype)
    cut = spec.num_heads * count * spec.value_dim
    return (flat[:cut].view(spec.num_heads, count, spec.value_dim).transpose(0, 1),
            flat[cut:].view(spec.num_heads, count).transpose(0, 1))
