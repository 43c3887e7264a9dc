"""Sleeping on a word of shared memory until another process changes it: Linux futexes through ctypes."""

import ctypes
import errno
import os
from typing import Final

_SYS_FUTEX: Final = 202  # x86_64
_FUTEX_WAIT: Final = 0  # without FUTEX_PRIVATE_FLAG: the waiters are other processes
_FUTEX_WAKE: Final = 1
_EVERYONE: Final = 2**31 - 1
# The word changed before the kernel looked, a signal came, or the time is up: the caller looks again.
_LOOK_AGAIN: Final = frozenset((errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT))


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# A call through CDLL lets go of the interpreter lock, so other threads of the rank run while it waits.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32,
                     ctypes.POINTER(_Timespec), ctypes.c_void_p, ctypes.c_uint32)


def futex_wait(address: int, value: int, timeout_s: float) -> None:
    """Sleep while the u32 at `address` is `value`, at most `timeout_s`. May return early: look again."""
    seconds = int(timeout_s)
    timeout = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    if _syscall(_SYS_FUTEX, address, _FUTEX_WAIT, value, ctypes.byref(timeout), None, 0) == -1:
        code = ctypes.get_errno()
        if code not in _LOOK_AGAIN:
            raise OSError(code, f"futex wait: {os.strerror(code)}")


def futex_wake(address: int) -> None:
    """Wake every process that sleeps on the u32 at `address`."""
    if _syscall(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYONE, None, None, 0) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"futex wake: {os.strerror(code)}")
