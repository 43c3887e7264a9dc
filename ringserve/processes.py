"""Starting our own processes: `python -m MODULE FD`, with one end of a socket pair inherited by number.

Never multiprocessing: a user's script that makes an LLM(...) has no `__main__` guard.
"""

import os
import socket
import subprocess
import sys
from typing import Any

from ringserve.channel import Channel

GRACE_S = 5.0
"""A process that was told to end, by closing its socket, is killed after this long."""


class ChildProcess:
    """A process of ours and our end of its socket. Closing the socket ends it."""

    def __init__(self, module: str, receives: Any, *, pass_fds: tuple[int, ...] = (),
                 environment: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())], pass_fds=(theirs.fileno(), *pass_fds),
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": _import_path(), **(environment or {})})
        self.socket = ours
        self.channel: Channel[Any] = Channel(ours, receives)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, timeout_s: float) -> int | None:
        """How it ended (negative: by that signal); None if it still runs after the time-out."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Close the socket and wait for the end, by force if need be."""
        self.channel.close()
        if self.exit_code(GRACE_S) is None:
            self._process.kill()
            self._process.wait()


def _import_path() -> str:
    """The child imports what this process imports, but never from the directory it happens to be started in."""
    return os.pathsep.join(path for path in sys.path if path)
