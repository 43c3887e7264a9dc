"""PrefixCache: blocks that outlive their requests, found by a hash chain over their tokens. No torch.

A block's key is the SHA-256 of the key before it and its own tokens; the first is the namespace's. So equal keys mean
equal tokens from the start, in the same namespace (and the tokens are compared, in case they do not). Blocks that are
still being computed are found too: whoever wants them waits for them instead of computing them again.

A lost block in the middle costs only itself: the blocks behind it are still right, and are found. What a block is worth
is what it would cost to compute again, which grows with its depth. GreedyDual (Cao and Irani 1997) joins that with
recency: a block's priority, when it is last used, is its cost plus the priority of what was last evicted.
"""

import hashlib
import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ringserve.block import Block, Copy
from ringserve.block_pool import BlockPool, NoFreeSlotsError
from ringserve.scheduling_params import SchedulingParams

if TYPE_CHECKING:
    from ringserve.request import Request


def namespace(*parts: str) -> bytes:
    """The key before the first block. Parts are length-prefixed: ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def next_key(previous: bytes, token_ids: bytes) -> bytes:
    return hashlib.sha256(previous + token_ids).digest()


def chain(first: bytes, token_ids: "array[int]", block_size: int, count: int) -> list[bytes]:
    """Keys of the first `count` blocks."""
    keys: list[bytes] = []
    for start in range(0, count * block_size, block_size):
        first = next_key(first, token_ids[start:start + block_size].tobytes())
        keys.append(first)
    return keys


class PrefixCache:
    """Owns every block. Gives slots to new blocks, evicting what nobody uses when a rank has none free."""

    def __init__(self, pool: BlockPool, block_size: int, cost: Callable[[int], float], *, enabled: bool = True,
                 identity: str = "") -> None:
        """`cost(index)`: what computing a block at this place of a prompt again would cost, in any unit. `identity`:
        what makes its keys others than those of the same tokens elsewhere: model, dtype, rotary scaling."""
        self.pool, self.block_size, self._cost, self.enabled = pool, block_size, cost, enabled
        self._identity = identity
        self._blocks: dict[bytes, Block] = {}
        self._idle = [0] * pool.ring_size
        """[ranks] copies of blocks that nobody uses."""
        self._heaps: list[list[tuple[float, int, Block]]] = [[] for _ in range(pool.ring_size)]
        self._numbers = itertools.count()
        self._floor = 0.0
        """Priority of what was last evicted."""
        self.evicted = 0
        """Copies, since the start."""

    def room_on(self, rank: int) -> int:
        """Slots that can be had: free, or with blocks that nobody uses; not those set aside."""
        return self.pool.free_on(rank) + self._idle[rank] - self.pool.reserved[rank]

    def first_key(self, scheduling: SchedulingParams) -> bytes:
        """Of whoever shares blocks with whom: what is before the first block."""
        return namespace(self._identity, scheduling.tenant, scheduling.cache_salt)

    def find(self, key: bytes, token_ids: bytes) -> Block | None:
        """A block with these tokens, complete or being computed. Raises nothing: other tokens are no hit."""
        block = self._blocks.get(key) if self.enabled else None
        return block if block is not None and block.token_ids == token_ids else None

    # Blocks in use

    def new_blocks(self, request: "Request", places: Sequence[tuple[int, int]]) -> list[Block]:
        """Blocks of a request: `places` are (number, rank). Raises NoFreeSlotsError and takes nothing."""
        counts = Counter(rank for _, rank in places)
        for rank, count in counts.items():
            self._make_room(rank, count)
        streams = {rank: iter(self.pool.take(rank, count)) for rank, count in counts.items()}
        return [self._own(request, next(streams[rank]), number) for number, rank in places]

    def extend(self, request: "Request", rank: int, after: Copy | None, index: int) -> Block:
        """One more block of a growing request. Raises NoFreeSlotsError."""
        self._make_room(rank, 1)
        return self._own(request, self.pool.extend(rank, after), index)

    def _own(self, request: "Request", copy: Copy, index: int) -> Block:
        return Block({copy.rank: copy}, index, owner=request, users=[request])

    def add_copy(self, block: Block, rank: int) -> Copy:
        """A slot for another copy of a block in use, on a rank that has none. Raises NoFreeSlotsError."""
        assert block.users and rank not in block.copies
        self._make_room(rank, 1)
        block.copies[rank] = copy = self.pool.take(rank, 1)[0]
        return copy

    def keep_copies(self, block: Block, ranks: set[int]) -> bool:
        """Give back the copies of a block in use that lie on other ranks. Whether there were any."""
        assert block.users
        spare = [rank for rank in block.copies if rank not in ranks]
        self.pool.give([block.copies.pop(rank) for rank in spare])
        return bool(spare)

    def use(self, block: Block, request: "Request") -> None:
        """One more request uses a block that was found."""
        if not block.users:
            for rank in block.copies:
                self._idle[rank] -= 1
        block.users.append(request)

    def publish(self, block: Block, key: bytes, token_ids: bytes) -> None:
        """Others may find the block from now on, unless they would find an equal one."""
        if self.enabled and key not in self._blocks:
            block.key, block.token_ids = key, token_ids
            self._blocks[key] = block

    def release(self, block: Block, request: "Request") -> None:
        """The request has done with the block. An unfinished one passes to its oldest user."""
        block.users.remove(request)
        if block.owner is request:
            block.owner = block.users[0] if block.users else None
        if block.users:
            return
        if block.key is None or block.computed < self.block_size:
            self._drop(block)
            return
        block.worth = self._floor + self._cost(block.index)
        block.turn = next(self._numbers)
        for rank in block.copies:
            self._idle[rank] += 1
            heapq.heappush(self._heaps[rank], (block.worth, block.turn, block))
            if len(self._heaps[rank]) > 2 * self._idle[rank] + 64:
                self._heaps[rank] = [entry for entry in self._heaps[rank] if self._is_due(entry, rank)]
                heapq.heapify(self._heaps[rank])

    def _is_due(self, entry: tuple[float, int, Block], rank: int) -> bool:
        """Whether an entry is about the block as it is: it may have been used, or evicted, since."""
        _, turn, block = entry
        return not block.users and block.turn == turn and rank in block.copies

    # Eviction

    def _make_room(self, rank: int, count: int) -> None:
        if count > self.pool.free_on(rank) + self._idle[rank]:
            raise NoFreeSlotsError(f"{count} slots wanted on rank {rank}, {self.pool.free_on(rank)} free and "
                                   f"{self._idle[rank]} idle")
        gone: list[Copy] = []
        while self.pool.free_on(rank) + len(gone) < count:
            entry = heapq.heappop(self._heaps[rank])
            if not self._is_due(entry, rank):
                continue
            worth, _, block = entry
            self._floor = worth
            gone.append(block.copies.pop(rank))
            if not block.copies:
                self._forget(block)
        self._idle[rank] -= len(gone)
        self.evicted += len(gone)
        self.pool.give(gone)

    def _drop(self, block: Block) -> None:
        self.pool.give(block.copies.values())
        block.copies = {}
        self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.key is not None and self._blocks.get(block.key) is block:
            del self._blocks[block.key]

    def clear(self) -> None:
        """Evict whatever nobody uses."""
        for rank in range(self.pool.ring_size):
            self._make_room(rank, self.pool.free_on(rank) + self._idle[rank])

    def check(self) -> None:
        """Full invariant check."""
        self.pool.check()
        for rank in range(self.pool.ring_size):
            idle = [b for b in self._blocks.values() if not b.users and rank in b.copies]
            assert self._idle[rank] == len(idle), (rank, self._idle[rank], len(idle))
            waiting = {id(entry[2]) for entry in self._heaps[rank] if self._is_due(entry, rank)}
            assert all(id(b) in waiting for b in idle), "an idle block that is never evicted"
        for key, block in self._blocks.items():
            assert block.key == key and block.copies
            assert block.users or block.computed == self.block_size
