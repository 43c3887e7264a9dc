"""Looking at processes from the outside: which are ours, whether they are gone, where they listen."""

import os
import signal
import time
from collections.abc import Iterable

import psutil

GONE_WITHIN_S = 10.0


def descendants(pid: int) -> dict[str, list[int]]:
    """The children's pids, all the way down, by the module they run (`rank_process`, `engine_process`, ...)."""
    found: dict[str, list[int]] = {}
    for child in psutil.Process(pid).children(recursive=True):
        for word in child.cmdline():
            if word.startswith(("ringserve.", "ringserve_api.")):
                found.setdefault(word.rsplit(".", 1)[1], []).append(child.pid)
    return found


def wait_until_gone(pids: Iterable[int]) -> None:
    """Fails when one of them still runs after the time-out."""
    left = set(pids)
    deadline = time.monotonic() + GONE_WITHIN_S
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if is_running(pid)}
        time.sleep(0.05)
    assert not left, f"still running: {left}"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def listeners(pids: Iterable[int]) -> set[tuple[str, int]]:
    """(address, port) of every listening TCP socket of these processes; IPv4 as such, also where IPv6 carries it."""
    return {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
            for pid in pids for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
