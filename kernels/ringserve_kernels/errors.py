"""What the kernels refuse."""


class ArgumentError(ValueError):
    """A shape, dtype, stride or device that a kernel cannot take: names the argument, its value and what is allowed."""


class KernelUnavailable(RuntimeError):
    """A kernel that cannot be used on this machine, and why."""


def require(holds: bool, argument: str, value: object, allowed: str) -> None:
    """Raises ArgumentError."""
    if not holds:
        raise ArgumentError(f"{argument} must be {allowed}, got {value}")
