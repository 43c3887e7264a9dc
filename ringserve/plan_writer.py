"""PlanWriter: a packed step as the ranks get it: only what they do not know yet."""

from collections.abc import Sequence

from ringserve.cost_model import CostModel
from ringserve.packing import Spans, count_tokens
from ringserve.plan import (
    BlockCopy,
    BlocksDealt,
    NewRequest,
    ScheduledRows,
    SchedulerOutput,
    TokensKnown,
    pack_ids,
)
from ringserve.request import Request


class PlanWriter:
    """Remembers in each request what has been told of it, and which requests are to be forgotten."""

    def __init__(self, cost: CostModel, block_size: int) -> None:
        self.epoch = 0
        self.step = 0
        self._cost, self._block_size = cost, block_size
        self._released: list[int] = []

    def write(self, picked: Sequence[tuple[Request, Spans]], copies: list[BlockCopy]) -> SchedulerOutput:
        """The plan of the next step."""
        self.step += 1
        new, tokens, blocks, rows = [], [], [], []
        for request, spans in picked:
            if not request.announced:
                new.append(NewRequest(request.handle, request.params, request.seed, request.end_token_ids,
                                      request.prompt_tokens))
                request.announced, request.announced_tokens, request.announced_blocks = True, 0, 0
            known = len(request.token_ids)
            if request.announced_tokens < known:
                tokens.append(TokensKnown(request.handle, request.announced_tokens,
                                          pack_ids(request.token_ids[request.announced_tokens:])))
                request.announced_tokens = known
            needed = -(-spans[-1][1] // self._block_size)
            if request.announced_blocks < needed:
                # Only now: a block that another request computes is told when it is complete.
                blocks.append(_dealt(request, request.announced_blocks, needed))
                request.announced_blocks = needed
            count = count_tokens(spans)
            rows.append(ScheduledRows(request.handle, spans, self._cost.modes(count, spans[0][0], len(request.ranks)),
                                      sample=count == len(request.token_ids) - request.done))
        released, self._released = self._released, []
        return SchedulerOutput(epoch=self.epoch, step=self.step, new=new, tokens=tokens, blocks=blocks,
                               copies=copies, rows=rows, released=released)

    def release(self, request: Request) -> None:
        """The ranks may forget it with the next plan."""
        if request.announced:
            self._released.append(request.handle)
            request.announced = False


def _dealt(request: Request, start: int, stop: int) -> BlocksDealt:
    blocks, holders = request.blocks[start:stop], request.holders[start:stop]
    slots = [block.copies[rank].slots for block, rank in zip(blocks, holders)]
    return BlocksDealt(request.handle, start, holders, [list(group) for group in zip(*slots)],
                       [block.computed for block in blocks])
