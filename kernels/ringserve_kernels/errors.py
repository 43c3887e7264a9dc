"""What the kernels refuse.

    ValueError
    └── ArgumentError       names the argument and says what is allowed
        ├── ShapeError      sizes that do not belong together
        ├── DtypeError
        ├── StrideError     a layout that the kernels do not read
        └── DeviceError     tensors on different devices, or where no kernel can run
    RuntimeError
    └── KernelUnavailable   not on this machine, and why
"""


class ArgumentError(ValueError):
    """An argument that no kernel takes: `argument` is its name."""

    def __init__(self, argument: str, got: object, allowed: object) -> None:
        super().__init__(f"{argument} is {got}; allowed: {allowed}")
        self.argument = argument


class ShapeError(ArgumentError):
    """Sizes that do not belong together, or that no kernel has been built for."""


class DtypeError(ArgumentError):
    """A dtype that no kernel reads or writes."""


class StrideError(ArgumentError):
    """A layout that the kernels do not read: the last axis must be contiguous."""


class DeviceError(ArgumentError):
    """A tensor on another device than the others, or where no kernel can run."""


class KernelUnavailable(RuntimeError):
    """A kernel that cannot be used on this machine, and why."""
