"""Holdings: which blocks running requests hold, where, and what they have set aside."""

from collections.abc import Iterable

from ringserve.block import Block
from ringserve.block_pool import NoFreeSlotsError
from ringserve.placement import Placement
from ringserve.plan import BlockCopy
from ringserve.prefix_cache import PrefixCache, next_key
from ringserve.request import Request

HOME_SLACK_BLOCKS = 4
"""Output blocks a home rank may hold beyond the mean and a quarter: short requests do not wander."""


class Holdings:
    """Requests take blocks, grow, fill them and let them go; slots and what is reserved follow."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache, self._pool, self._block_size = cache, cache.pool, cache.block_size
        self.copies: list[BlockCopy] = []
        """To be made before the next step."""
        self.copying: set[Request] = set()
        """For these."""

    def take_copies(self) -> list[BlockCopy]:
        copies, self.copies, self.copying = self.copies, [], set()
        return copies

    def take(self, request: Request, placement: Placement) -> None:
        """Give a request that begins what was found for it."""
        cache, size, found = self._cache, self._block_size, placement.found
        request.ranks = list(placement.ranks)
        for rank, count in enumerate(placement.reserve):
            self._pool.reserved[rank] += count
        request.reserved = list(placement.reserve)
        for block in found.values():  # before anything is evicted to make room
            cache.use(block, request)
        # One call for all, so that their slots are adjacent.
        numbers = [n for n in range(len(placement.holders)) if n not in found]
        made = dict(zip(numbers, cache.new_blocks(request, [(n, placement.holders[n]) for n in numbers])))
        for number, rank in enumerate(placement.holders):
            block = found.get(number) or made[number]
            if rank not in block.copies:
                self._copy(block, rank, request)
            request.take_block(block, rank)
            if number in made and number < len(request.keys):
                cache.publish(block, request.keys[number],
                              request.token_ids[number * size:(number + 1) * size].tobytes())

    def _copy(self, block: Block, rank: int, request: Request) -> None:
        assert block.computed == self._block_size
        source = next(iter(block.copies.values()))
        copy = self._cache.add_copy(block, rank)
        self.copying.add(request)
        self.copies.append(BlockCopy(source.rank, rank, list(source.slots), list(copy.slots)))

    def grow(self, request: Request) -> None:
        """One more block, on the rank that is the output's home; on any rank when the request's own are full. Raises
        NoFreeSlotsError."""
        def has_room(rank: int) -> bool:
            return request.reserved[rank] > 0 or self._cache.room_on(rank) > 0

        held, home = request.held, request.home
        mean = sum(held) / len(request.ranks)
        if home is None or held[home] > 1.25 * mean + HOME_SLACK_BLOCKS or not has_room(home):
            open_ranks = [r for r in request.ranks if has_room(r)] or [
                r for r in range(self._pool.ring_size) if has_room(r)]
            if not open_ranks:
                raise NoFreeSlotsError("what is free is reserved for others")
            home = request.home = min(open_ranks, key=lambda r: (held[r], -self._cache.room_on(r), r))
            if home not in request.ranks:
                request.ranks.append(home)
        last = next((b.copies[home] for b, holder in zip(reversed(request.blocks), reversed(request.holders))
                     if holder == home), None)
        if request.reserved[home]:
            request.reserved[home] -= 1
            self._pool.reserved[home] -= 1
        request.take_block(self._cache.extend(request, home, last, len(request.blocks)), home)

    def drop_spare_copies(self, running: Iterable[Request]) -> bool:
        """Give up copies that no request uses of blocks that are in use. Whether there were any."""
        dropped = False
        for request in running:
            for number, block in enumerate(request.blocks):
                if len(block.copies) > 1:
                    used = {user.holders[number] for user in block.users}
                    dropped |= self._cache.keep_copies(block, used)
        return dropped

    def let_go(self, request: Request) -> None:
        """Of everything: complete blocks stay in the cache."""
        for block in reversed(request.forget_blocks()):
            self._cache.release(block, request)
        for rank, count in enumerate(request.reserved):
            self._pool.reserved[rank] -= count
        request.reserved = [0] * self._pool.ring_size

    def commit(self, request: Request, spans: Iterable[tuple[int, int]]) -> None:
        """The tokens of these spans are computed: in every request that shares their blocks."""
        size = self._block_size
        for start, stop in spans:
            if start < request.prompt_tokens:
                request.count_computed(start, min(stop, request.prompt_tokens))
            while start < stop:
                number = start // size
                until = min(stop, (number + 1) * size)
                block = request.blocks[number]
                block.computed = until - number * size
                for user in block.users:
                    user.block_grew(number, until - start)
                if block.computed == size:
                    block.owner = None
                    if block.key is None and self._cache.enabled:
                        self._publish(request, number)
                start = until

    def _publish(self, request: Request, number: int) -> None:
        """A block that filled up with output, or was computed beside an equal one, may be found from now on."""
        size, token_ids = self._block_size, request.token_ids
        tokens = token_ids[number * size:(number + 1) * size].tobytes()
        if number == len(request.keys):
            before = request.keys[-1] if request.keys else self._cache.first_key(request.scheduling)
            request.keys.append(next_key(before, tokens))
        if number < len(request.keys):
            self._cache.publish(request.blocks[number], request.keys[number], tokens)

    def check(self, running: Iterable[Request]) -> None:
        """Full invariant check of running requests against the cache and the pool."""
        running = list(running)
        self._cache.check()
        used = {id(block): block for request in running for block in request.blocks}
        copies = {copy for block in used.values() for copy in block.copies.values()}
        idle = {copy for block in self._cache._blocks.values() if not block.users for copy in block.copies.values()}
        assert copies | idle == self._pool._used and not copies & idle, "slots that no block has"
        assert self._pool.reserved == [sum(r.reserved[rank] for r in running)
                                       for rank in range(self._pool.ring_size)]
        for request in running:
            request.check(self._block_size)
        for block in used.values():
            assert block.owner is None or block.owner in block.users
            assert block.computed == self._block_size or block.owner is not None, "a block that nobody computes"
