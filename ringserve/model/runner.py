"""ModelRunner: runs a plan on one rank. The only thing it knows of requests is their tables."""

import resource
import time
from collections.abc import Sequence

import torch
from ringserve_kernels import TILES, KernelUnavailable, Layout, RingPlan, choose, plan_ring, ring_attention
from torch import Tensor, nn

from ringserve.config import AttentionName, KVCacheDtype
from ringserve.errors import ConfigError
from ringserve.model.copies import copy_blocks
from ringserve.model.kv_cache import STORED, KVCache, key_bytes
from ringserve.model.layers import AttentionLayer, forward
from ringserve.model.sampler import SampleInput, sample
from ringserve.model.tables import StepRows, Tables
from ringserve.plan import LayerGroup, RankOutput, RankTimes, RowLogits, SampledTokens, SchedulerOutput
from ringserve.ring.group import RingGroup


def layer_groups(layers: Sequence[AttentionLayer], stored: torch.dtype) -> list[LayerGroup]:
    """Layers by window and cache shape, in the order in which they first appear; `stored`: what keys are kept as."""
    members: dict[tuple[object, ...], list[int]] = {}
    for number, layer in enumerate(layers):
        members.setdefault((layer.spec.cache_shape, layer.spec.window, layer.spec.num_heads), []).append(number)
    return [LayerGroup(num_kv_heads=s.num_kv_heads, key_dim=s.key_dim, value_dim=s.value_dim, window=s.window,
                       layers=tuple(numbers), num_heads=s.num_heads, key_bytes=key_bytes(s, stored))
            for numbers in members.values() for s in [layers[numbers[0]].spec]]


class StepAttention:
    """One step as the model's attention layers see it: where rows are written, and what the ring exchanges."""

    def __init__(self, layers: Sequence[AttentionLayer], group_of: Sequence[int], cache: KVCache, ring: RingGroup,
                 plans: list[RingPlan], write_at: list[Tensor]) -> None:
        self._layers, self._group_of, self._cache, self._ring = layers, group_of, cache, ring
        self._plans, self._write_at = plans, write_at
        self.attention_s = 0.0

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, H, T, Dk], key [1, K, T, Dk], value [1, K, T, Dv] -> [1, T, H, Dv]."""
        started = time.perf_counter()
        group = self._group_of[layer_idx]
        layer = self._layers[layer_idx]
        self._cache.write(layer_idx, key[0], value[0], self._write_at[group])
        o_THD = ring_attention(query[0].transpose(0, 1), self._cache.layers[layer_idx], self._plans[group],
                               layer.spec, self._ring, layer.sinks)
        self.attention_s += time.perf_counter() - started
        return o_THD.unsqueeze(0)


class ModelRunner:
    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], *, block_size: int, segment: int,
                 device: torch.device, dtype: torch.dtype, attention: AttentionName = "auto",
                 kv_cache_dtype: KVCacheDtype = "auto") -> None:
        """Raises ConfigError when the attention kernel that is asked for cannot be used."""
        self.model, self.layers, self.device, self.dtype = model, layers, device, dtype
        self._stored = STORED.get(kv_cache_dtype, dtype)
        self.groups = layer_groups(layers, self._stored)
        self._group_of = [next(g for g, group in enumerate(self.groups) if i in group.layers)
                          for i in range(len(layers))]
        try:
            self.choices = [choose(layers[group.layers[0]].spec, dtype, device, block_size, attention,
                                   quantized=kv_cache_dtype in STORED)
                            for group in self.groups]
        except KernelUnavailable as error:
            raise ConfigError(str(error)) from None
        self._layouts = [choice.layout for choice in self.choices]
        self.block_size, self._segment = block_size, segment
        self._ring = RingGroup(None)

    @property
    def ring(self) -> RingGroup:
        return self._ring

    def layout_of(self, layer: int) -> Layout:
        """How a layer's keys lie in the cache."""
        return self._layouts[self._group_of[layer]]

    def allocate(self, slots: int, ring: RingGroup, agreed: Sequence[bool] | None = None) -> None:
        """A fresh cache and empty tables, on this ring. `agreed` [groups]: whether keys would lie alike on all its
        ranks; they travel as they lie, so where they would not, torch's operations serve."""
        self._ring = ring
        if agreed is not None:
            self._layouts = [choice.layout if same else TILES for choice, same in zip(self.choices, agreed)]
        self._tables = Tables(ring.rank, ring.size, len(self.groups), self.block_size)
        self._cache = KVCache([layer.spec for layer in self.layers], [self._layouts[g] for g in self._group_of], slots,
                              self.block_size, self._stored, self.device)

    def execute(self, plan: SchedulerOutput) -> RankOutput:
        """Copy blocks as the plan says, compute this rank's rows of it, and report."""
        started = time.perf_counter()
        self._ring.reset_statistics()
        self._ring.begin_step(plan.step, plan.epoch)
        copy_blocks(plan.copies, self._cache.layers, self._group_of, self.block_size,
                    max(1, self._segment // self.block_size), self._ring)
        copied = self._ring.statistics()
        rows = self._tables.apply(plan)
        plans = [plan_ring(self._ring.rank, self._ring.size, rows.sequences[g], group.window, self._segment,
                           self.device, self._cache.layers[group.layers[0]].layout.granule)
                 for g, group in enumerate(self.groups)]
        step = StepAttention(self.layers, self._group_of, self._cache, self._ring, plans,
                             [torch.from_numpy(offsets).to(self.device) for offsets in rows.write_at])
        sampled: list[SampledTokens] = []
        logits: list[RowLogits] = []
        if len(rows.token_ids):
            sampled, logits = self._forward(rows, step)
        else:
            self._serve(step, plans)
        moved = self._ring.statistics()
        exchanging = moved.wait_s - copied.wait_s + moved.packing_s - copied.packing_s
        times = RankTimes(total=time.perf_counter() - started, attention=step.attention_s - exchanging,
                          packing=moved.packing_s, wait=moved.wait_s)
        return RankOutput(step=plan.step, rank=self._ring.rank, sampled=sampled, logits=logits, times=times,
                          bytes_sent=list(moved.sent_bytes),
                          peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def absorb(self, plan: SchedulerOutput) -> None:
        """Take in what a plan says of requests that have nothing on this rank."""
        self._tables.absorb(plan)

    def _forward(self, rows: StepRows, step: StepAttention) -> tuple[list[SampledTokens], list[RowLogits]]:
        wanted = torch.tensor([s.row for s in rows.samples], dtype=torch.int64, device=self.device)
        logits = forward(self.model, torch.from_numpy(rows.token_ids).to(self.device),
                         torch.from_numpy(rows.positions).to(self.device), wanted, step)
        chosen = [i for i, s in enumerate(rows.samples) if s.sample]
        sampled = sample(logits[chosen], [SampleInput(
            s.request.new, torch.from_numpy(s.request.token_ids[:s.request.num_tokens]))
            for s in rows.samples if s.sample]) if chosen else []
        return sampled, [RowLogits(s.handle, s.position, logits[i].float().cpu().numpy().tobytes())
                         for i, s in enumerate(rows.samples) if not s.sample]

    def _serve(self, step: StepAttention, plans: list[RingPlan]) -> None:
        """A rank without rows does not run the model (its layers cannot work on no token): it walks them by
        their specs and serves the keys that others attend to."""
        for number, layer in enumerate(self.layers):
            if not plans[self._group_of[number]].is_empty:
                s = layer.spec
                step.attend(number, *(torch.empty(1, heads, 0, dim, dtype=self.dtype, device=self.device)
                                      for heads, dim in ((s.num_heads, s.key_dim), (s.num_kv_heads, s.key_dim),
                                                         (s.num_kv_heads, s.value_dim))))
