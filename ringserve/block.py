"""Block: consecutive tokens of one or more requests, whose keys lie in a slot of each rank that holds a copy."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringserve.request import Request


@dataclass(frozen=True, slots=True)
class Copy:
    """A block's keys on one rank: per layer group, the slot there."""

    rank: int
    slots: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Block:
    """Requests with equal tokens up to its end share it; one of them, its owner, computes what is missing of it."""

    copies: dict[int, Copy]
    """By rank."""
    index: int
    """It holds the tokens [index * block_size, (index + 1) * block_size) of its requests."""
    computed: int = 0
    """Tokens whose keys are there."""
    owner: "Request | None" = None
    users: "list[Request]" = field(default_factory=list)
    """Running requests, oldest first."""
    key: bytes | None = None
    """Of its tokens and all before them, in their namespace; None while its tokens are not all known."""
    token_ids: bytes = b""
    """Its own tokens: a key found in the cache is verified."""
    worth: float = 0.0
    """The higher, the later it is evicted."""
    turn: int = -1
    """Counts releases: which of its entries in the order of eviction is the valid one."""
