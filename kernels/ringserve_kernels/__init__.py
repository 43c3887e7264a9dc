"""Attention over a shard of a paged KV cache that returns (o, lse), and the ring that merges the shards exactly.

Pure tensor functions: no requests, no scheduler, no transport. Layouts are written in shape suffixes, explained at
the top of each file; `lse` is natural logarithm, fp32, -inf where a row sees no key, and `o` is 0 there.
"""

from ringserve_kernels.attend import attend
from ringserve_kernels.attention_plan import AttentionPlan, KeyBlocks, RowSpan, plan_attention
from ringserve_kernels.case import Case
from ringserve_kernels.choice import Choice, choose
from ringserve_kernels.errors import ArgumentError, KernelUnavailable
from ringserve_kernels.key_values import KeyValues
from ringserve_kernels.layout import Layout
from ringserve_kernels.merge import merge_attention_states, merge_rows, merge_sink, new_state
from ringserve_kernels.native.layout import NativeLayout
from ringserve_kernels.reference import reference_attention
from ringserve_kernels.ring import Ring, Ticket
from ringserve_kernels.ring_attention import ring_attention
from ringserve_kernels.ring_plan import RingPlan, RingSequence, plan_ring
from ringserve_kernels.rounds import Message, Rounds
from ringserve_kernels.spec import AttentionSpec
from ringserve_kernels.tile import attend_tile, backend
from ringserve_kernels.tile_layout import TILES, TileLayout

__all__ = [
    "TILES", "ArgumentError", "AttentionPlan", "AttentionSpec", "Case", "Choice", "KernelUnavailable", "KeyBlocks",
    "KeyValues", "Layout", "Message", "NativeLayout", "Ring", "RingPlan", "RingSequence", "Rounds", "RowSpan",
    "Ticket", "TileLayout", "attend", "attend_tile", "backend", "choose", "merge_attention_states", "merge_rows",
    "merge_sink", "new_state", "plan_attention", "plan_ring", "reference_attention", "ring_attention",
]
