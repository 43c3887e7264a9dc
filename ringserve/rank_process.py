"""A rank: loads the model, then runs plan after plan. `python -m ringserve.rank_process CONTROL_FD`.

The process ends when its control socket closes, whatever it computes at that moment.
"""

import os
import signal
import sys
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from ringserve.channel import Channel, Inbox, exit_now
from ringserve.errors import RingserveError
from ringserve.plan import LayerGroup, SchedulerOutput
from ringserve.rank_messages import (
    AllocateCache,
    CacheReady,
    FreeMemory,
    MissedPlans,
    RankFailed,
    RankLoaded,
    RankSetup,
    ToRank,
)

if TYPE_CHECKING:
    import torch

    from ringserve.model.runner import ModelRunner
    from ringserve.ring.group import RingGroup


class RankProcess:
    def __init__(self, control: Channel[ToRank]) -> None:
        self._control = control
        self._inbox = Inbox(control, on_close=exit_now)
        self._rank = -1
        self._runner: ModelRunner | None = None

    def run(self) -> int:
        import ringserve.model.loading  # noqa: F401  # takes seconds: not after the engine has asked

        try:
            while True:
                self._main(self._inbox.get())
        except Exception as error:
            self._abort_ring()
            if not isinstance(error, RingserveError):
                traceback.print_exc()
            message = error.message if isinstance(error, RingserveError) else f"{type(error).__name__}: {error}"
            self._control.send(RankFailed(rank=self._rank, kind=type(error).__name__, message=message,
                                          peer=getattr(error, "peer", None)))
            return 1

    def _abort_ring(self) -> None:
        """Peers that wait for this rank come free at once."""
        if self._runner is not None:
            self._runner.ring.abort()

    def _load(self, setup: RankSetup) -> None:
        import torch

        from ringserve.model.checkpoint import read_checkpoint
        from ringserve.model.linear import linear_size, pack_linears
        from ringserve.model.loading import load_checked
        from ringserve.model.memory import free_bytes
        from ringserve.model.probe import probe
        from ringserve.model.runner import ModelRunner

        self._setup, self._rank = setup, setup.rank
        torch.set_num_threads(setup.threads)
        torch.set_grad_enabled(False)
        device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        config = setup.config
        model, layers = load_checked(read_checkpoint(replace(config.model, model=setup.checkpoint)), device, dtype)
        self._runner = runner = ModelRunner(
            model, layers, block_size=config.cache.block_size, segment=config.ring.ring_segment, device=device,
            dtype=dtype, attention=config.model.attention, kv_cache_dtype=config.cache.kv_cache_dtype)
        packing = pack_linears(model, lambda: probe(model, [0], [0]), free_bytes(device), config.ring.ring_size)
        self._control.send(RankLoaded(
            rank=setup.rank, groups=runner.groups,
            kv_bytes_per_token=sum(len(group.layers) * group.key_bytes for group in runner.groups),
            linear_flops_per_token=2.0 * linear_size(model), linear=packing,
            message_bytes=max(self._message_bytes(group, dtype.itemsize) for group in runner.groups),
            kernels=[choice.layout.name for choice in runner.choices],
            orders=[choice.layout.order for choice in runner.choices],
            attention=[f"{_describe(group)}: {choice.words}" for group, choice in zip(runner.groups, runner.choices)]))

    def _message_bytes(self, group: LayerGroup, element: int) -> int:
        """The largest of: a segment of keys, or copied blocks of as many; a chunk's queries; its partial results."""
        config = self._setup.config
        segment = max(config.ring.ring_segment, config.cache.block_size) * group.key_bytes
        rows = config.scheduler.max_chunk_tokens * group.num_heads
        return max(segment, rows * group.key_dim * element, rows * (group.value_dim + 1) * max(4, element))

    def _main(self, message: ToRank) -> None:
        if isinstance(message, RankSetup):
            self._load(message)
            return
        assert self._runner is not None, "a rank is set up before anything else"
        if isinstance(message, SchedulerOutput):
            self._control.send(self._runner.execute(message))
        elif isinstance(message, MissedPlans):
            for plan in message.plans:
                self._runner.absorb(plan)
        elif isinstance(message, AllocateCache):
            self._allocate(self._runner, message)
        else:
            from ringserve.model.memory import free_bytes

            self._control.send(FreeMemory(rank=self._rank, free_bytes=free_bytes(self._runner.device)))

    def _allocate(self, runner: "ModelRunner", order: AllocateCache) -> None:
        from ringserve.model.probes import attention_flops, link_bytes_per_s

        runner.ring.close()
        ring = self._connect(order, runner.device)
        runner.allocate(order.slots, ring, order.agreed)
        self._control.send(CacheReady(
            rank=self._rank, attention_flops=attention_flops(runner),
            link_bytes_per_s=link_bytes_per_s(ring, order.epoch, order.message_bytes)))

    def _connect(self, order: AllocateCache, device: "torch.device") -> "RingGroup":
        from ringserve.ring.group import RingGroup

        setup = self._setup
        size, timeout = setup.config.ring.ring_size, setup.config.ring.ring_timeout_s
        if size == 1:
            return RingGroup(None)
        if setup.transport == "shm":
            from ringserve.ring.shared_memory import SharedMemoryTransport

            return RingGroup(SharedMemoryTransport(setup.region_fd, rank=setup.rank, size=size,
                                                   slot_bytes=order.message_bytes, epoch=order.epoch,
                                                   timeout_s=timeout))
        if setup.transport == "gloo":
            from ringserve.ring.gloo import GlooTransport

            return RingGroup(GlooTransport(setup.directory, rank=setup.rank, size=size, epoch=order.epoch,
                                           timeout_s=timeout))
        if setup.transport == "symm":
            from ringserve.ring.symmetric import SymmetricMemoryTransport

            return RingGroup(SymmetricMemoryTransport(setup.directory, rank=setup.rank, size=size,
                                                      slot_bytes=order.message_bytes, epoch=order.epoch,
                                                      device=device, timeout_s=timeout))
        from ringserve.ring.nccl import NcclTransport

        return RingGroup(NcclTransport(setup.directory, rank=setup.rank, size=size, epoch=order.epoch,
                                       device=device, timeout_s=timeout))


def _describe(group: LayerGroup) -> str:
    window = "" if group.window is None else f", window {group.window}"
    heads = f"{group.num_heads} heads of {group.key_dim} on {group.num_kv_heads}"
    return f"{len(group.layers)} layer{'s' * (len(group.layers) > 1)} ({heads}{window})"


def main() -> None:
    # Ctrl-C and a service manager's SIGTERM go to the whole group; a rank ends when its engine closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control: Channel[ToRank] = Channel.from_fd(int(sys.argv[1]), ToRank)
    code = RankProcess(control).run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
