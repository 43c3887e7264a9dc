"""Tenants: who has had how much of the machine. Start-time fair queueing (Goyal et al. 1996) over predicted seconds."""

from collections.abc import Iterable, Sequence

from ringserve.errors import ConfigError


class Tenants:
    """Virtual time per tenant: seconds served over weight. The one with the least is served next, so while two have
    work their shares stay within one step of their weights; one that was idle saves nothing up."""

    def __init__(self, weights: Sequence[str] = ()) -> None:
        """`weights`: texts like "name=2"; 1 for all others. Raises ConfigError."""
        self._weights = dict(map(_weight, weights))
        self._served: dict[str, float] = {}

    @property
    def several(self) -> bool:
        """More than one has been seen; with one there is nothing to share."""
        return len(self._served) > 1

    def join(self, tenant: str, active: Iterable[str]) -> None:
        """A tenant has work, besides the `active` ones: it begins no further back than the one of them that has had the
        least."""
        active = set(active)
        if tenant in active and tenant in self._served:
            return  # it keeps its turn
        others = {name: self._served[name] for name in active if name != tenant and name in self._served}
        now = min(others.values(), default=0.0)
        # Those who have nothing to do and are not ahead would begin at `now` as well: forgotten. An idle machine owes
        # nobody anything and nobody owes it.
        self._served = {name: served for name, served in self._served.items()
                        if name in others or (others and served > now)}
        self._served[tenant] = max(self._served.get(tenant, 0.0), now)

    def served(self, tenant: str) -> float:
        return self._served.get(tenant, 0.0) if len(self._served) > 1 else 0.0

    def charge(self, tenant: str, seconds: float) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + max(seconds, 0.0) / self._weights.get(tenant, 1.0)


def _weight(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < 1e6:
        raise ConfigError(f"a tenant's weight is written name=2, got {text!r}")
    return name, weight
