"""Request: what is known of one prompt and its answer. State is per block; there are no phases."""

import enum
import math
from array import array
from dataclasses import dataclass, field

from ringserve.block import Block
from ringserve.fit import Vector
from ringserve.sampling_params import SamplingParams
from ringserve.scheduling_params import SchedulingParams

PROGRESS_INTERVAL_S = 0.1


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    """Holds no blocks."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Token ids, the blocks they live in, and how far it has come.

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
    arrival: float
    """Monotonic seconds."""
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    wanted_ranks: tuple[int, ...] = ()
    """The ranks it must use; empty: the scheduler chooses."""
    return_progress: bool = False

    prompt_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    keys: list[bytes] = field(default_factory=list)
    """Of its complete blocks, as far as they are known: the prompt's at once, the output's as they fill."""
    blocks: list[Block] = field(default_factory=list)
    holders: list[int] = field(default_factory=list)
    """[blocks] the rank whose copy it uses."""
    ranks: list[int] = field(default_factory=list)
    """That hold its blocks or take its new ones."""
    held: list[int] = field(default_factory=list)
    """[ring_size] its blocks on each rank."""
    keys_on: list[int] = field(default_factory=list)
    """[ring_size] its computed tokens on each rank."""
    done: int = 0
    """Tokens of its blocks that are computed, by whomever."""
    cursor: int = 0
    """All blocks before this one are complete."""
    reserved: list[int] = field(default_factory=list)
    """[ring_size] blocks set aside for it."""
    home: int | None = None
    """The rank that holds the blocks of its output."""
    announced: bool = False
    """The ranks know its parameters, tokens and blocks, as far as these numbers:"""
    announced_tokens: int = 0
    announced_blocks: int = 0
    decode_work: "list[tuple[int, Vector]] | None" = None
    """What a token costs it, while it holds the same blocks."""

    computed_itself: int = 0
    """Prompt tokens that were computed for it, each counted once."""
    counted_until: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were not; set when the first token is there."""
    deadline: float = 0.0
    leniency: float = 1.0
    """Its wish for a first token over the default one."""
    total_s: float = 0.0
    """Predicted seconds of its whole prefill, alone, when it arrived."""
    first_cached: int = 0
    """Tokens that were computed when it started to run."""
    last_progress: float = -math.inf
    """Monotonic seconds at which its progress was last reported."""

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def num_missing(self) -> int:
        """Tokens that are known and not computed, by whomever they will be."""
        return len(self.token_ids) - self.done

    def finish_reason(self, token: int) -> str | None:
        """Why the answer ends with this token, its latest; None when it goes on."""
        params = self.params
        if (token in self.end_token_ids or token in params.stop_token_ids) and (
                self.output_tokens >= params.min_tokens) and (
                token in params.stop_token_ids or not params.ignore_eos):
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def progress_is_due(self, now: float) -> bool:
        """Whether the last word is a while ago: steps may take milliseconds. Counts as said when it is due."""
        due = now - self.last_progress >= PROGRESS_INTERVAL_S
        if due:
            self.last_progress = now
        return due

    def missing(self, block_size: int, limit: int) -> list[tuple[int, int]]:
        """The first missing tokens that it can compute now, in position order, at most `limit`, as spans [start, stop),
        adjacent ones joined. Ends at a block that another request is computing: what follows needs its keys.
        Tokens without a block yet are missing too."""
        blocks, known = self.blocks, len(self.token_ids)
        while self.cursor < len(blocks) and blocks[self.cursor].computed == block_size:
            self.cursor += 1
        spans: list[tuple[int, int]] = []
        number = self.cursor
        while limit > 0 and number * block_size < known:
            done = 0
            if number < len(blocks):
                block = blocks[number]
                done = block.computed
                if block.owner is not self and done < block_size:
                    break
            start = number * block_size + done
            stop = min((number + 1) * block_size, known, start + limit)
            if start < stop:
                if spans and spans[-1][1] == start:
                    spans[-1] = (spans[-1][0], stop)
                else:
                    spans.append((start, stop))
                limit -= stop - start
            number += 1
        return spans

    def take_block(self, block: Block, rank: int) -> None:
        """Append a block, using its copy on `rank`."""
        self.blocks.append(block)
        self.holders.append(rank)
        self.held[rank] += 1
        self.keys_on[rank] += block.computed
        self.done += block.computed
        self.decode_work = None

    def block_grew(self, number: int, tokens: int) -> None:
        """So many more tokens of its block are computed."""
        self.done += tokens
        self.keys_on[self.holders[number]] += tokens

    def count_computed(self, start: int, stop: int) -> None:
        """The prompt tokens [start, stop) were computed for it, for the first time or again."""
        self.computed_itself += max(0, stop - max(start, self.counted_until))
        self.counted_until = max(self.counted_until, stop)

    def forget_blocks(self) -> list[Block]:
        """Let go of all blocks (their tokens become missing) and return them."""
        blocks, self.blocks = self.blocks, []
        self.holders, self.ranks = [], []
        self.held, self.keys_on = [0] * len(self.held), [0] * len(self.keys_on)
        self.done = self.cursor = 0
        self.home, self.decode_work = None, None
        return blocks

    def check(self, block_size: int) -> None:
        assert len(self.blocks) == len(self.holders)
        known = len(self.token_ids)
        assert all(0 <= b.computed <= min(block_size, max(0, known - i * block_size))
                   for i, b in enumerate(self.blocks))
        assert all(b.computed == block_size for b in self.blocks[:self.cursor])
        assert self.done == sum(b.computed for b in self.blocks)
        for rank in range(len(self.held)):
            mine = [b for b, holder in zip(self.blocks, self.holders) if holder == rank]
            assert self.held[rank] == len(mine) and self.keys_on[rank] == sum(b.computed for b in mine)
            assert all(rank in b.copies for b in mine)
        assert all(b.index == i and self in b.users for i, b in enumerate(self.blocks))
        assert self.num_missing >= 1 or self.status is RequestStatus.FINISHED
