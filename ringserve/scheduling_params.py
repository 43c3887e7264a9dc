"""SchedulingParams: how one request is queued: whose it is, how urgent, and with whom it shares cached blocks."""

import math

import msgspec

from ringserve.errors import InvalidValueError

MAX_PRIORITY = 8
MAX_NAME = 256
"""Characters of a tenant's name and of a salt."""


class SchedulingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Raises InvalidValueError, naming the field, when a value cannot work."""

    tenant: str = ""
    """Who asks, as the server knows it. Tenants share the machine fairly and never see each other's cached blocks."""
    priority: int = 0
    """-8 to 8. The default deadline is multiplied by 2 ** priority, so lower is sooner (as in vLLM)."""
    deadline_s: float | None = None
    """Wish for the first token, in seconds from arrival. Unset: proportional to the prompt's own cost."""
    cache_salt: str = ""
    """Requests share cached blocks only with requests of the same tenant and salt."""

    def __post_init__(self) -> None:
        self._check_types()
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidValueError(
                f"priority must be in {-MAX_PRIORITY} to {MAX_PRIORITY}, got {self.priority}", "priority")
        if self.deadline_s is not None and not (math.isfinite(self.deadline_s) and self.deadline_s > 0):
            raise InvalidValueError(f"deadline_s must lie in the future, got {self.deadline_s}", "deadline_s")
        for name in ("tenant", "cache_salt"):
            if len(getattr(self, name)) > MAX_NAME:
                raise InvalidValueError(f"{name} must have at most {MAX_NAME} characters, got "
                                        f"{len(getattr(self, name))}", name)

    def _check_types(self) -> None:
        """A Struct checks types when it is decoded, not when it is made."""
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type, strict=True)
                if isinstance(value, str):
                    value.encode()
            except msgspec.ValidationError as error:
                what = str(error)
                raise InvalidValueError(f"{field.name}: {what[:1].lower()}{what[1:]}", field.name) from None
            except UnicodeEncodeError:
                raise InvalidValueError(f"{field.name} holds half a surrogate pair", field.name) from None
