"""Copies of blocks between ranks: a plan's copies as exchanges of the ring, carried out before the step's rows.

    copies of the plan                      for layer 0, layer 1, ...: the same exchanges
      0 -> 1, 0 -> 1, 1 -> 2, 0 -> 2        shift 1: rank 0 sends two blocks, rank 1 gets them and sends one to 2
                                            shift 2: rank 0 sends one block to 2; rank 1 sits out

All ranks see the same copies, so what r sends to s is what s expects, in the same order everywhere.

Shape suffixes: K kv heads, P tokens of the pool, S slots of the pool, B tokens of a block, N blocks of a message,
D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ringserve_kernels import KeyValues, Message, Ring, Rounds
from torch import Tensor

from ringserve.plan import BlockCopy


@dataclass(frozen=True, slots=True)
class CopyExchange:
    """Blocks that go to rank + shift, and those that come in from rank - shift; either may be none."""

    shift: int
    send_slots: list[Tensor]
    """[groups] of [N], int64."""
    receive_slots: list[Tensor]


def plan_copies(rank: int, size: int, copies: Sequence[BlockCopy], most_blocks: int,
                device: torch.device | None = None) -> list[CopyExchange]:
    """One rank's exchanges, which each layer repeats. `most_blocks` is the most blocks in one message."""
    _check(copies)
    exchanges = []
    for shift in range(1, size):
        to, source = (rank + shift) % size, (rank - shift) % size
        sent = [c.source_slots for c in copies if (c.source, c.destination) == (rank, to)]
        received = [c.destination_slots for c in copies if (c.source, c.destination) == (source, rank)]
        exchanges += [CopyExchange(shift, _by_group(sent[i:i + most_blocks], copies, device),
                                   _by_group(received[i:i + most_blocks], copies, device))
                      for i in range(0, max(len(sent), len(received)), most_blocks)]
    return exchanges


def copy_blocks(copies: Sequence[BlockCopy], layers: Sequence[KeyValues], group_of: Sequence[int], block_size: int,
                most_blocks: int, ring: Ring) -> None:
    """Carry out a plan's copies on this rank: on return, what it receives is in its cache and what it sends is
    written. Every rank of the ring calls it with the same copies."""
    exchanges = plan_copies(ring.rank, ring.size, copies, most_blocks, layers[0].k_KPD.device)
    turns = [(layer, exchange.shift, exchange.send_slots[group], exchange.receive_slots[group])
             for layer, group in zip(layers, group_of) for exchange in exchanges]
    rounds = Rounds(ring, [_message(layer, shift, send, len(receive), block_size)
                           for layer, shift, send, receive in turns])
    for message, (layer, _, _, receive) in zip(rounds, turns):
        for pool_KPD, arrived_KPD in zip(layer.parts, layer.laid_over(message).parts):
            _blocks(pool_KPD, block_size).index_copy_(1, receive, _blocks(arrived_KPD, block_size))


def _message(layer: KeyValues, shift: int, send_N: Tensor, receive_count: int, block_size: int) -> Message:
    def fill(buffer: Tensor) -> None:
        for pool_KPD, out_KPD in zip(layer.parts, layer.laid_over(buffer).parts):
            torch.index_select(_blocks(pool_KPD, block_size), 1, send_N, out=_blocks(out_KPD, block_size))

    block_bytes = block_size * layer.token_bytes
    return Message(shift, len(send_N) * block_bytes, fill, receive_count * block_bytes)


def _blocks(tokens_KPD: Tensor, block_size: int) -> Tensor:
    """The same memory as blocks_KSBD."""
    heads, tokens, dim = tokens_KPD.shape
    return tokens_KPD.view(heads, tokens // block_size, block_size, dim)


def _by_group(slots: list[list[int]], copies: Sequence[BlockCopy], device: torch.device | None) -> list[Tensor]:
    return [torch.tensor([of_block[group] for of_block in slots], dtype=torch.int64, device=device)
            for group in range(len(copies[0].source_slots))]


def _check(copies: Sequence[BlockCopy]) -> None:
    """No copy comes before another: no slot may be written twice, or both read and written."""
    assert all(c.source != c.destination for c in copies), "a block is copied to the rank that holds it"
    read = {(c.source, place) for c in copies for place in enumerate(c.source_slots)}
    written = [(c.destination, place) for c in copies for place in enumerate(c.destination_slots)]
    assert len(written) == len(set(written)), "two copies into one slot"
    assert read.isdisjoint(written), "a slot is both copied and overwritten in one step"
