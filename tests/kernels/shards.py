"""A ragged batch whose keys are dealt over shards, in storage that is NaN everywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from ringserve_kernels import (
    AttentionSpec,
    KeyBlocks,
    KeyValues,
    RowSpan,
    attend,
    merge_attention_states,
    new_state,
    plan_attention,
    reference_attention,
)
from ringserve_kernels.quantize import dequantize, quantize
from torch import Tensor

from tests.kernels.backends import TORCH, Backend

State = tuple[Tensor, Tensor]


def make_spec(*, kv_heads: int = 2, group: int = 2, dim: int = 32, value_dim: int | None = None,
              window: int | None = None, softcap: float | None = None) -> AttentionSpec:
    return AttentionSpec(num_heads=kv_heads * group, num_kv_heads=kv_heads, key_dim=dim,
                         value_dim=value_dim or dim, scale=dim**-0.5, window=window, softcap=softcap)


@dataclass(frozen=True)
class Batch:
    """What is drawn: the shape of a batch and how its keys lie."""

    lengths: tuple[tuple[int, int], ...]
    """(cached, new) tokens of each sequence."""
    shares: tuple[int, ...] = (1,)
    """Of the blocks, per shard, in parts: (1, 0, 5) leaves shard 1 empty."""
    block: int = 16
    scatter: bool = True
    """Blocks lie in random slots, else in adjacent ones."""
    sparse_rows: bool = False
    """Only some of the new tokens are rows: holes are being refilled."""
    peak: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def shards(self) -> int:
        return len(self.shares)


@dataclass
class DealtSequence:
    span: RowSpan
    blocks: list[KeyBlocks]
    """[shards]"""
    k_SKD: Tensor
    v_SKD: Tensor

    @property
    def tokens(self) -> int:
        return len(self.k_SKD)


class Shards:
    """The batch as tensors: one q for all rows, one storage per shard, and what the oracle says."""

    def __init__(self, batch: Batch, spec: AttentionSpec, backend: Backend = TORCH,
                 stored: torch.dtype | None = None) -> None:
        """`stored`: the keys' format, if not the queries'."""
        self.batch, self.spec, self.backend, self.stored = batch, spec, backend, stored or batch.dtype
        self._rng = np.random.default_rng(batch.seed)
        self._generator = torch.Generator().manual_seed(batch.seed)
        self._slots = sum(-(-(cached + new) // batch.block) for cached, new in batch.lengths) + 1
        self._free = [list(self._rng.permutation(self._slots) if batch.scatter else range(self._slots))
                      for _ in batch.shares]
        self.stores = [self._poisoned() for _ in batch.shares]
        self.rows = 0
        self.sequences = [self._deal(cached, new) for cached, new in batch.lengths]
        self.q_THD = self._normal(self.rows, spec.num_heads, spec.key_dim) * batch.peak

    def _poisoned(self) -> KeyValues:
        """A storage in which everything that is not written is NaN."""
        spec, tokens = self.spec, self._slots * self.batch.block
        layout = self.backend.layout(self.batch.dtype, self.batch.block)
        shapes = [(spec.num_kv_heads, tokens, dim) for dim in (spec.key_dim, spec.value_dim)]
        if self.stored is self.batch.dtype:
            k, v = (torch.full(shape, torch.nan, dtype=self.stored) for shape in shapes)
            return KeyValues(k, v, None, layout)
        k, v = (torch.full(shape, 0x7F, dtype=torch.uint8).view(self.stored) for shape in shapes)
        scales = [torch.full((spec.num_kv_heads, tokens), torch.nan) for _ in range(2)]
        return KeyValues(k, v, (scales[0], scales[1]), layout)

    def _kept(self, x_SKD: Tensor) -> Tensor:
        """What the storage knows of these numbers: the oracle attends to that."""
        if self.stored is self.batch.dtype:
            return x_SKD
        # Torch's operations take numbers in the queries' format; others apply the scales to scores and weights.
        exact = torch.float64 if self.backend.scales_scores else self.batch.dtype
        return dequantize(*quantize(x_SKD, self.stored), exact)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64).to(self.batch.dtype)

    def _deal(self, cached: int, new: int) -> DealtSequence:
        spec, size, total = self.spec, self.batch.block, cached + new
        k = self._normal(total, spec.num_kv_heads, spec.key_dim)
        v = self._normal(total, spec.num_kv_heads, spec.value_dim) + 0.5
        parts = np.array(self.batch.shares, dtype=np.float64)
        owners = self._rng.choice(len(parts), size=-(-total // size), p=parts / parts.sum())
        blocks = []
        for shard, store in enumerate(self.stores):
            mine = np.flatnonzero(owners == shard)
            first, length = mine * size, np.minimum(size, total - mine * size)
            offset = np.array([self._free[shard].pop(0) * size for _ in mine], dtype=np.int64)
            blocks.append(KeyBlocks(first, length, offset))
            index, where = blocks[-1].keys()
            store.write(k[index].transpose(0, 1), v[index].transpose(0, 1), torch.from_numpy(where))
        index = np.arange(cached, total)
        if self.batch.sparse_rows:
            index = np.sort(self._rng.choice(index, size=-(-new // 2), replace=False))
        span = RowSpan(self.rows, index.astype(np.int64))
        self.rows += len(index)
        return DealtSequence(span, blocks, self._kept(k), self._kept(v))

    def attend(self, shard: int, into: State | None = None, spec: AttentionSpec | None = None) -> State:
        """All rows over the keys of one shard."""
        spec = spec or self.spec
        plan = plan_attention(self.rows, [(s.span, s.blocks[shard]) for s in self.sequences], spec.window)
        return attend(self.q_THD, self.stores[shard], plan, spec, into)

    def attend_all(self) -> State:
        """The partials of all shards, merged."""
        state = new_state(self.rows, self.spec.num_heads, self.spec.value_dim, self.batch.dtype,
                          torch.device("cpu"))
        for shard in range(self.batch.shards):
            merge_attention_states(*state, *self.attend(shard))
        return state

    def expected(self, shard: int | None = None, sink_H: Tensor | None = None) -> State:
        """The oracle over one shard's keys, or over all."""
        parts = []
        for s in self.sequences:
            index = np.arange(s.tokens) if shard is None else s.blocks[shard].keys()[0]
            rows = slice(s.span.start, s.span.start + len(s.span.index))
            parts.append(reference_attention(
                self.q_THD[rows], s.k_SKD[index], s.v_SKD[index], torch.from_numpy(s.span.index),
                torch.from_numpy(index), self.spec, sink_H))
        o_THD, lse_TH = zip(*parts)
        return torch.cat(o_THD), torch.cat(lse_TH)

    def with_values(self, value: float) -> "Shards":
        """The same batch with every V a constant."""
        other = Shards(self.batch, self.spec, self.backend, self.stored)
        for s in other.sequences:
            for store, blocks in zip(other.stores, s.blocks):
                index, where = blocks.keys()
                store.write(s.k_SKD[index].transpose(0, 1).to(self.batch.dtype),
                            torch.full_like(s.v_SKD[index], value).transpose(0, 1).to(self.batch.dtype),
                            torch.from_numpy(where))
        return other


def batches(dtype: torch.dtype = torch.float32, blocks: Sequence[int] = TORCH.blocks) -> st.SearchStrategy[Batch]:
    lengths = st.tuples(st.integers(0, 150), st.integers(1, 70))
    shares = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any).map(tuple)
    return st.builds(
        Batch, lengths=st.lists(lengths, min_size=1, max_size=3).map(tuple), shares=shares,
        block=st.sampled_from(blocks), scatter=st.booleans(), sparse_rows=st.booleans(),
        peak=st.sampled_from([1.0, 4.0]), dtype=st.just(dtype), seed=st.integers(0, 2**32 - 1))


def specs(backend: Backend = TORCH) -> st.SearchStrategy[AttentionSpec]:
    return st.builds(
        make_spec, kv_heads=st.sampled_from([1, 2]), group=st.sampled_from([1, 3, 4, 8]),
        dim=st.sampled_from(backend.dims), value_dim=st.sampled_from(backend.value_dims),
        window=st.sampled_from([None, None, 1, 7, 40, 500]), softcap=st.sampled_from([None, None, 5.0]))


FEW_CASES = (
    (Batch(((40, 21),), (1,)), make_spec(group=1)),
    (Batch(((33, 9), (0, 20), (17, 1)), (3, 0, 1), scatter=False, peak=4.0), make_spec(group=4, value_dim=24)),
    (Batch(((50, 30),), (1, 2), sparse_rows=True), make_spec(kv_heads=1, group=3, window=7)),
    (Batch(((70, 1), (5, 1)), (1, 1), block=32, peak=4.0), make_spec(kv_heads=1, group=8, softcap=5.0)),
)
"""What a slow backend is asked: a bit of everything."""


def cases(backend: Backend, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[tuple[Batch, AttentionSpec]]:
    """What this backend can take."""
    if backend.slow:
        return st.sampled_from([(replace(batch, dtype=dtype), spec) for batch, spec in FEW_CASES])
    return st.tuples(batches(dtype, backend.blocks), specs(backend))
