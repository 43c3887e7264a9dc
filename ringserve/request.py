"""Request: what is known of one prompt and its answer. State is per block; there are no phases."""

import enum
from array import array
from dataclasses import dataclass, field

from ringserve.block_pool import Block
from ringserve.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    """Holds no blocks."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Token ids, the blocks they live in, and how many tokens of each block are computed.

    The last known token stays missing until its logits have been used: so a request always has something to
    compute, whether its keys survived, were found in a cache or are all to be made.
    """

    request_id: str
    handle: int
    token_ids: "array[int]"
    """Prompt and output so far."""
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]
    max_total_tokens: int
    """Prompt plus the longest output allowed."""
    ranks: list[int]
    """The ranks its new blocks are dealt to."""
    arrival: float
    """Monotonic seconds."""
    return_progress: bool = False
    last_progress: float = 0.0
    """Monotonic seconds at which its progress was last reported."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    blocks: list[Block] = field(default_factory=list)
    computed: "array[int]" = field(default_factory=lambda: array("I"))
    """[blocks] tokens computed of each."""
    cursor: int = 0
    """All blocks before this one are full and computed."""
    reserved: int = 0
    """Blocks set aside for it in the pool."""
    home: int | None = None
    """The rank that holds the blocks of its output."""
    announced: bool = False
    """The ranks know its parameters and tokens."""
    announced_tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def num_computed(self) -> int:
        return sum(self.computed)

    def missing(self, block_size: int, limit: int) -> list[tuple[int, int]]:
        """The first missing tokens in position order, at most `limit`, as spans [start, stop), adjacent ones
        joined. Tokens without a block yet are missing too."""
        self._advance(block_size)
        spans: list[tuple[int, int]] = []
        known = len(self.token_ids)
        block = self.cursor
        while limit > 0 and block * block_size < known:
            done = self.computed[block] if block < len(self.computed) else 0
            start = block * block_size + done
            stop = min((block + 1) * block_size, known, start + limit)
            if start < stop:
                if spans and spans[-1][1] == start:
                    spans[-1] = (spans[-1][0], stop)
                else:
                    spans.append((start, stop))
                limit -= stop - start
            block += 1
        return spans

    def _advance(self, block_size: int) -> None:
        while self.cursor < len(self.computed) and self.computed[self.cursor] == block_size:
            self.cursor += 1

    def num_missing(self, block_size: int) -> int:
        self._advance(block_size)
        return len(self.token_ids) - self.cursor * block_size - sum(self.computed[self.cursor:])

    def mark_computed(self, spans: list[tuple[int, int]], block_size: int) -> None:
        for start, stop in spans:
            for block in range(start // block_size, -(-stop // block_size)):
                until = min(stop, (block + 1) * block_size) - block * block_size
                self.computed[block] = max(self.computed[block], until)

    def drop_blocks(self) -> list[Block]:
        """Forget all blocks (they become missing) and return them."""
        blocks, self.blocks = self.blocks, []
        self.computed = array("I")
        self.cursor = 0
        self.home = None
        return blocks

    def check(self, block_size: int) -> None:
        assert len(self.blocks) == len(self.computed)
        known = len(self.token_ids)
        assert all(0 <= c <= min(block_size, known - i * block_size) for i, c in enumerate(self.computed))
        assert all(c == block_size for c in self.computed[:self.cursor])
        assert self.num_missing(block_size) >= 1 or self.status is RequestStatus.FINISHED
