"""Placer: how many ranks a request uses, which, and where each of its blocks lies. No torch.

Short prompts live on one rank, long ones on more: as many as still pay, by the cost model. Blocks that are found in the
cache are used where they are; a narrow request has those of another rank copied to its own when that is cheaper than
waiting for the busier rank, so that a hot system prompt makes no rank hot and no chat wide.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ringserve.block import Block
from ringserve.block_pool import deal
from ringserve.cost_model import CostModel
from ringserve.prefix_cache import PrefixCache
from ringserve.request import Request

GAIN = 0.75
"""Twice the ranks must make a request 1.5 times as fast: the time of the others is not free."""
PROBES = 16
TYPICAL_OUTPUT = 128
"""Output tokens that count when a width is chosen, if so many may come."""


@dataclass(frozen=True, slots=True)
class Placement:
    ranks: list[int]
    """That the request uses."""
    holders: list[int]
    """[blocks] the rank whose copy of each block it uses; a found block without a copy there is copied."""
    reserve: list[int]
    """[ring_size] blocks to set aside for its output."""
    found: dict[int, Block]
    """Blocks that need not be made, by number."""


class Placer:
    def __init__(self, cache: PrefixCache, cost: CostModel, width: int | None = None) -> None:
        """`width`: of every request; None: as many ranks as pay."""
        self._cache, self._pool, self._cost, self._width = cache, cache.pool, cost, width
        self._ring = self._pool.ring_size
        self._widths = [w for w in (1 << i for i in range(8)) if w < self._ring] + [self._ring]

    def width_of(self, request: Request) -> int:
        """Ranks that a request should use, by its length alone."""
        if request.wanted_ranks:
            return len(request.wanted_ranks)
        if self._width is not None:
            return min(self._width, self._ring)
        tokens = len(request.token_ids)
        output = min(TYPICAL_OUTPUT, request.max_total_tokens - tokens)
        blocks = -(-request.max_total_tokens // self._cache.block_size)
        fitting = [w for w in self._widths if blocks <= w * self._pool.slots_per_rank] or [self._ring]
        best, best_s = fitting[0], self._seconds(tokens, output, fitting[0])
        for width in fitting[1:]:
            seconds = self._seconds(tokens, output, width)
            if best_s >= GAIN * width / best * seconds:
                best, best_s = width, seconds
        return best

    def _seconds(self, tokens: int, output: int, width: int) -> float:
        prefill = self._cost.prefill_seconds(0, tokens, width, math.inf, 2048, self._cache.block_size)
        return prefill + output * self._cost.decode_seconds(tokens, width)

    def find(self, request: Request) -> dict[int, Block]:
        """Blocks of a request that are in the cache or being computed, by number. The last known token is left out:
        its logits are needed, and a shared block is never written twice."""
        size, token_ids = self._cache.block_size, request.token_ids
        count = min(len(request.keys), (len(token_ids) - 1) // size)

        def look(number: int) -> Block | None:
            return self._cache.find(request.keys[number], token_ids[number * size:(number + 1) * size].tobytes())

        # A million tokens are 16,384 blocks, and whoever waits is looked up again and again: first a few, early and
        # throughout. What is lost is a short stretch in the middle of a long prompt.
        if not any(look(number) for number in _probes(count)):
            return {}
        found = ((number, look(number)) for number in range(count))
        return {number: block for number, block in found if block is not None}

    def place(self, request: Request, blocks: int, reserve: int, loads: Sequence[float], keep: int = 0, *,
              alone: bool = False) -> Placement | None:
        """Where the request's `blocks` and `reserve` more would lie now; None when there is no room. `loads`: [ranks]
        seconds of work that each has. `keep`: slots of each rank that must stay free. `alone`: nothing else runs, so
        waiting brings no room; what was found is given up if spare copies of it are in the way."""
        room = [self._cache.room_on(rank) - keep for rank in range(self._ring)]
        found = self.find(request)
        width = self.width_of(request)
        for ranks in self._candidates(request, found, width, loads):
            placement = self._on(request, ranks, blocks, reserve, found, room, keep)
            if placement is not None:
                return placement
        return self._on(request, list(range(self._ring)), blocks, reserve, {}, room, keep) if alone and found else None

    def _candidates(self, request: Request, found: dict[int, Block], width: int,
                    loads: Sequence[float]) -> list[list[int]]:
        """Sets of ranks to try: the best of that width, then all."""
        everyone = list(range(self._ring))
        if request.wanted_ranks:
            return [list(request.wanted_ranks)]
        if width == self._ring:
            return [everyone]
        size = self._cache.block_size

        def price(rank: int) -> float:
            absent = sum(rank not in block.copies for block in found.values())
            return loads[rank] + (self._cost.copy_seconds(absent * size) if absent else 0.0)

        ordered = sorted(everyone, key=lambda r: (price(r), -self._cache.room_on(r), r))
        return [ordered[:width], everyone]

    def _on(self, request: Request, ranks: list[int], blocks: int, reserve: int, found: dict[int, Block],
            room: Sequence[int], keep: int) -> Placement | None:
        room = list(room)
        held = [0] * self._ring
        where: dict[int, int] = {}
        for number, block in found.items():
            if not block.users:
                for rank in block.copies:
                    room[rank] -= 1  # idle until now: it was counted as room
            near = [rank for rank in ranks if rank in block.copies]
            if near:
                rank = min(near, key=lambda r: held[r])
            elif len(ranks) == 1 and block.computed == self._cache.block_size:
                rank = ranks[0]
                room[rank] -= 1  # for the copy
            else:
                rank = min(block.copies, key=lambda r: held[r])
            where[number] = rank
            held[rank] += 1
        used = sorted({*ranks, *where.values()})
        # Other ranks may hold copies that are no longer idle then, though they were reckoned as room.
        if min(room[rank] for rank in used) < 0 or min(room) + keep < 0:
            return None
        if blocks - len(found) + reserve > sum(room[rank] for rank in used):
            return None
        made = deal(used if len(ranks) > 1 else ranks, blocks - len(found), held, room)
        if made is None:
            return None
        holders, fresh = [], iter(made)
        for number in range(blocks):
            rank = where[number] if number in where else next(fresh)
            holders.append(rank)
            if number not in where:
                room[rank] -= 1
                held[rank] += 1
        later = deal(ranks, reserve, held, room)
        if later is None:
            return None
        return Placement(used, holders, [later.count(rank) for rank in range(self._ring)], found)


def _probes(count: int) -> list[int]:
    early = itertools.takewhile(lambda n: n < count, (0, *(1 << i for i in range(40))))
    return sorted({*early, *range(0, count, max(1, count // PROBES))})
