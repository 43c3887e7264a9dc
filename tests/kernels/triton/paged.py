"""Batches of tests/kernels/shards.py on the device where Triton's kernels run: a GPU, else the interpreter's CPU."""

import pytest
import torch
from ringserve_kernels.triton import PagedTable, Quantized, page_table, triton_attend
from ringserve_kernels.triton.arguments import INTERPRETED

from tests.kernels.shards import Shards, State

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("there is a GPU, but torch cannot use it", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


class PagedShards(Shards):
    """A batch that the kernels attend to: NaN wherever no key lies."""

    def table(self, shard: int = 0, only: int | None = None) -> PagedTable:
        """Of all sequences, or with the rows of one alone."""
        sequences = [(s.span, s.blocks[shard]) for i, s in enumerate(self.sequences) if only in (None, i)]
        return page_table(self.rows, sequences, self.spec, self.batch.block, DEVICE)

    def attend_paged(self, shard: int = 0, into: State | None = None, only: int | None = None) -> State:
        store = self.stores[shard]
        return triton_attend(self.q_THD.to(DEVICE), store.k_KPD.to(DEVICE), store.v_KPD.to(DEVICE),
                             self.table(shard, only), self.spec, into)

    def attend_all_paged(self) -> State:
        """All shards, one after the other, into the same accumulators."""
        state: State | None = None
        for shard in range(self.batch.shards):
            state = self.attend_paged(shard, into=state)
        assert state is not None
        return state

    def attend_quantized(self, k: Quantized, v: Quantized) -> State:
        return triton_attend(self.q_THD.to(DEVICE), k, v, self.table(), self.spec)


def on_host(state: State) -> State:
    return state[0].cpu(), state[1].cpu()
