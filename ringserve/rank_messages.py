"""What the engine and a rank say to each other besides plans and their results."""

import msgspec

from ringserve.config import EngineConfig
from ringserve.plan import LayerGroup, RankOutput, SchedulerOutput


class RankSetup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What to load and where. The first message; a later one puts another model in its place."""

    rank: int
    config: EngineConfig
    checkpoint: str
    """Directory of the model."""
    dtype: str
    device: str
    threads: int
    transport: str
    """`shm`, `gloo`, `nccl` or `symm`; unused in a ring of one."""
    region_fd: int
    """Of the shared memory region; -1 without."""
    directory: str
    """Private to this start, for the rendezvous files of all but `shm`."""


class RankLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is loaded and was found to be one that can be served."""

    rank: int
    groups: list[LayerGroup]
    kv_bytes_per_token: int
    linear_flops_per_token: float
    linear: str
    """How the linear layers are computed, and why."""
    message_bytes: int
    """Of the largest message of the ring."""
    kernels: list[str]
    """[groups] what this rank would compute a group with."""
    orders: list[str]
    """[groups] how its keys would lie then."""
    attention: list[str]
    """[groups] the kernel in words, and why."""


class AllocateCache(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make a KV cache of this many slots, instead of any there is, and connect to the ring of this epoch."""

    slots: int
    epoch: int
    message_bytes: int
    agreed: list[bool]
    """[groups] whether keys would lie alike on all ranks, so that they may travel as they lie."""


class CacheReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    rank: int
    attention_flops: float
    """Measured attention FLOP/s of the rank."""
    link_bytes_per_s: float
    """Measured bytes/s to the next rank; 0 in a ring of one."""


class MissedPlans(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Plans that had nothing to do for this rank, in order. Not answered."""

    plans: list[SchedulerOutput]


class MeasureMemory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How much memory is free now? Asked after the largest step has been run once."""


class FreeMemory(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    rank: int
    free_bytes: int
    """On the rank's device; for CPU ranks, of the host."""


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The rank's last message. `kind` is the name of the error's class."""

    rank: int
    kind: str
    message: str
    peer: int | None = None
    """The rank that is to blame, when this one only waited for it."""


ToRank = RankSetup | AllocateCache | MeasureMemory | MissedPlans | SchedulerOutput
FromRank = RankLoaded | CacheReady | FreeMemory | RankOutput | RankFailed
