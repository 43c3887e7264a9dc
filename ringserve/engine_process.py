"""The engine: scheduler and supervisor of the ranks. `python -m ringserve.engine_process CONTROL_FD`.

Ends when its control socket closes, and takes its ranks along: their sockets close with it.
"""

import hashlib
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from ringserve.cache_directory import cache_directory
from ringserve.channel import Channel, ChannelClosedError, Inbox
from ringserve.devices import place_ranks
from ringserve.engine import LLMEngine
from ringserve.errors import EngineDeadError, EngineError, OverloadedError, RequestError, RingserveError
from ringserve.executor import LocalExecutor
from ringserve.processes import GRACE_S
from ringserve.updates import (
    AddRequest,
    Admission,
    AskEstimate,
    CancelRequest,
    Command,
    EngineFailed,
    EngineReady,
    EngineSetup,
    RequestUpdate,
    StartupFailed,
    Updates,
)

logger = logging.getLogger(__name__)

KEEP_S = 60.0
"""Between two times that what was learned of the machine is written down."""


def learned_path(*what: str) -> Path:
    """The file for what steps of this model cost on this machine and ring."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = platform.processor()
    cores = str(os.cpu_count())
    digest = hashlib.sha256("\0".join([platform.machine(), cpu, cores, torch_version(), *what]).encode()).hexdigest()
    return cache_directory() / "costs" / f"{digest[:24]}.json"


def torch_version() -> str:
    return importlib.metadata.version("torch")


class EngineProcess:
    def __init__(self, control: Channel[Command]) -> None:
        self._control = control
        self._executor: LocalExecutor | None = None
        self._kept = -KEEP_S
        self._abandoned = threading.Event()
        self._inbox = Inbox(control, on_close=self._abandon)

    def run(self) -> int:
        """Serve until the ranks fail (1) or cannot start (2)."""
        try:
            code = self._run()
        except ChannelClosedError:
            code = 0
        if self._abandoned.is_set():
            threading.Event().wait(2 * GRACE_S)  # the other thread ends the process
        elif self._executor is not None:
            self._executor.close()
        return code

    def _abandon(self) -> None:
        """The client is gone, whatever this process is doing: take the ranks along, leave nothing behind."""
        self._abandoned.set()
        if self._executor is not None:
            self._executor.close()
        os._exit(0)

    def _run(self) -> int:
        try:
            self._startup()
        except RingserveError as error:
            self._control.send(StartupFailed(kind=type(error).__name__, message=error.message,
                                             rank=getattr(error, "rank", None)))
            return 2
        except Exception as error:
            if self._abandoned.is_set():
                return 0
            logger.exception("the engine cannot start")
            self._control.send(StartupFailed(kind="EngineDeadError",
                                             message=f"the engine cannot start: {type(error).__name__}: {error}"))
            return 1
        try:
            self._main_loop()
        except EngineError as error:
            rank = error.rank if isinstance(error, EngineDeadError) else None
            self._control.send(EngineFailed(message=error.message, rank=rank))
            return 1
        except Exception as error:
            if self._abandoned.is_set():
                return 0
            logger.exception("the engine stops on an error of its own")
            self._control.send(EngineFailed(message=f"the engine failed: {type(error).__name__}: {error}"))
            return 1
        return 0

    def _startup(self) -> None:
        setup = self._inbox.get()
        assert isinstance(setup, EngineSetup)
        config = setup.config
        placement = place_ranks(config.ring)
        self._executor = LocalExecutor(config.ring.ring_size, placement, config.ring.step_timeout_s)
        from ringserve.model.checkpoint import read_checkpoint  # takes seconds, as the ranks' own imports do

        checkpoint = read_checkpoint(replace(config.model, model=setup.checkpoint))
        self._executor.load(config, setup.checkpoint, checkpoint.dtype)
        learned = learned_path(
            setup.checkpoint, checkpoint.architecture, checkpoint.dtype, str(checkpoint.weight_bytes),
            str(config.ring.ring_size), placement.transport, str(placement.threads), *placement.devices,
            *self._executor.kernels, config.cache.kv_cache_dtype)
        self._engine = LLMEngine(config, self._executor, checkpoint.max_model_len, checkpoint.vocab_size,
                                 checkpoint.element_bytes, learned)
        machine = self._engine.machine
        self._control.send(EngineReady(
            ring_size=config.ring.ring_size, max_model_len=self._engine.max_model_len,
            kv_capacity_tokens=self._engine.pool.total * config.cache.block_size,
            kv_bytes_per_token=self._executor.kv_bytes_per_token, dtype=checkpoint.dtype, pids=self._executor.pids,
            decisions=[
                f"model: {checkpoint.architecture} in {Path(setup.checkpoint).name}, {checkpoint.dtype}, "
                f"{checkpoint.weight_bytes / 2**30:.2f} GiB of weights",
                *placement.reasons,
                *(f"attention, {path}" for path in self._executor.attention),
                f"linear layers: {self._executor.linear}",
                f"measured: {machine.flops / 1e9:.0f} GFLOP/s of attention a rank"
                + (f", {machine.link_bytes_per_s / 2**30:.1f} GiB/s to the next rank"
                   if config.ring.ring_size > 1 else ""),
                *self._engine.decisions]))

    def _main_loop(self) -> None:
        """Take commands between steps; without work, wait for one."""
        while True:
            self._keep_what_was_learned()
            for command in self._inbox.drain() if self._engine.has_work else [self._inbox.get()]:
                self._take(command)
            if self._engine.has_work:
                self._send(self._engine.scheduler.waiting_updates())
                self._send(self._engine.step())

    def _take(self, command: Command) -> None:
        if isinstance(command, CancelRequest):
            self._engine.cancel(command.request_id, satisfied=command.satisfied)
            return
        assert isinstance(command, AddRequest | AskEstimate), type(command)
        asked = command.request if isinstance(command, AskEstimate) else command
        try:
            estimate = self._engine.add(asked) if command is asked else self._engine.estimate(asked)
            self._control.send(Admission(request_id=asked.request_id, estimate=estimate))
        except RequestError as error:
            self._control.send(Admission(
                request_id=asked.request_id, refusal=error.message, kind=type(error).__name__, param=error.param,
                retry_after_s=error.retry_after_s if isinstance(error, OverloadedError) else None))

    def _keep_what_was_learned(self) -> None:
        """Not often: it is a file, and it need not be the newest."""
        now = time.monotonic()
        if now - self._kept < KEEP_S:
            return
        self._kept = now
        try:
            self._engine.save_learned()
        except OSError as error:
            logger.warning("what steps cost cannot be kept for the next start: %s", error)

    def _send(self, updates: list[RequestUpdate]) -> None:
        if updates:
            self._control.send(Updates(updates=updates))


def main() -> None:
    # Ctrl-C and a service manager's SIGTERM go to the whole group; the engine ends when its client closes the socket,
    # so that a drain can finish.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    code = EngineProcess(Channel.from_fd(int(sys.argv[1]), Command)).run()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
