"""What goes to the ranks and what comes back: SchedulerOutput and ModelOutput, as frames with a schema.

Plans carry deltas; ranks keep tables. A request is known to the ranks by a small number, its handle. Token ids
travel as little-endian u32 bytes: a million of them parse in under a millisecond.
"""

import sys
from array import array
from typing import Literal

import msgspec

from ringserve.outputs import TokenLogprob
from ringserve.sampling_params import SamplingParams

Mode = Literal["pass-kv", "pass-q"]


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Layers whose keys live and die together: same K and V shape, same window. A block has a slot in each."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    layers: tuple[int, ...]
    num_heads: int
    """Query heads, for the cost model; layers of one group agree."""
    key_bytes: int
    """Of one token's key and value in one layer, as they are kept and travel."""


class NewRequest(msgspec.Struct, frozen=True):
    handle: int
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]
    """Tokens that must not be sampled before `min_tokens`."""
    prompt_tokens: int


class TokensKnown(msgspec.Struct, frozen=True):
    """Token ids of positions [start, start + n) of a request: its prompt, or what was sampled last."""

    handle: int
    start: int
    token_ids: bytes


class BlocksDealt(msgspec.Struct, frozen=True):
    """Blocks [start, start + n): who holds them and, per layer group, in which slot of the holder."""

    handle: int
    start: int
    holders: list[int]
    slots: list[list[int]]
    """[groups][n]"""
    computed: list[int]
    """[n] tokens whose keys are there already: found in the cache, or computed by another request."""


class BlockCopy(msgspec.Struct, frozen=True):
    """A complete block to be copied to another rank before the step's rows: from then on both hold it."""

    source: int
    destination: int
    source_slots: list[int]
    """[groups]"""
    destination_slots: list[int]
    """[groups]"""


class ScheduledRows(msgspec.Struct, frozen=True):
    """Missing tokens of one request to compute in this step."""

    handle: int
    spans: list[tuple[int, int]]
    """Token positions [start, stop), ascending, not necessarily contiguous."""
    modes: list[Mode]
    """[groups] what travels. The scheduler decides: a rank decides nothing that changes a message."""
    sample: bool
    """The last known token is among the rows: its logits give the next token."""
    logits_at: list[int] = []
    """Positions among the rows whose logits are to be reported: for tests of exactness, never while serving."""


class SchedulerOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step. The only thing that goes to the ranks while they serve."""

    epoch: int
    step: int
    new: list[NewRequest] = []
    tokens: list[TokensKnown] = []
    blocks: list[BlocksDealt] = []
    copies: list[BlockCopy] = []
    rows: list[ScheduledRows] = []
    released: list[int] = []
    """Handles whose blocks are gone, before this step: finished, cancelled or parked requests."""

    @property
    def num_tokens(self) -> int:
        return sum(stop - start for rows in self.rows for start, stop in rows.spans)


class SampledTokens(msgspec.Struct, frozen=True):
    handle: int
    token_ids: list[int]
    """A list: speculation will return several."""
    logprobs: list[TokenLogprob]
    error: str | None = None
    """Why no token could be chosen: the request ends with this error, the others go on."""


class RowLogits(msgspec.Struct, frozen=True):
    handle: int
    position: int
    logits: bytes
    """fp32, [vocabulary]."""


class RankTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step on one rank."""

    total: float
    attention: float
    """In attention layers, but for the two below."""
    packing: float
    """Filling and posting messages: on CPUs that share memory this is the transfer itself."""
    wait: float
    """For a peer's message, or for a slot that a peer had not read yet: what the overlap does not hide."""


class RankOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one rank reports of a step."""

    step: int
    rank: int
    sampled: list[SampledTokens]
    times: RankTimes
    bytes_sent: list[int]
    """[ranks] payload bytes sent to each."""
    peak_rss_bytes: int
    logits: list[RowLogits] = []


class ModelOutput(msgspec.Struct, frozen=True):
    """A finished step: every rank has reported. The only thing that comes back."""

    step: int
    sampled: list[SampledTokens]
    ranks: list[RankOutput]


def pack_ids(token_ids: "array[int]") -> bytes:
    assert token_ids.typecode == "I" and token_ids.itemsize == 4
    if sys.byteorder == "big":
        token_ids = array("I", token_ids)
        token_ids.byteswap()
    return token_ids.tobytes()


def unpack_ids(data: bytes) -> "array[int]":
    token_ids = array("I")
    token_ids.frombytes(data)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids
