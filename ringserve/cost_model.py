"""CostModel: the one place that knows what work costs. No torch.

Attention pairs grow with the square of the prompt, so progress in tokens says little: a prefill is weighted by
    cost(p) = linear * p + pair * p^2 / 2
per full layer (min(p, window) per window layer). Seconds come from finished steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ringserve.plan import LayerGroup, Mode


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was measured at start."""

    flops: float
    """Attention FLOP/s that one rank sustains."""
    link_bytes_per_s: float
    """Bytes/s from one rank to another; infinity for a ring of one."""
    element_bytes: int
    """Of one number in the KV cache."""
    overlaps: bool
    """Whether transfers run beside the attention (a GPU's copy engines and network card), or take the same cores."""


def passes_kv(new: int, cached: int, group: LayerGroup, ranks: int, machine: Machine) -> bool:
    """Whether keys should travel instead of queries (Yang et al. 2024, 2411.01783, algorithm 5), for one chunk.

    pass-KV if T >= N C K e / (2 H BW), when its transfer hides behind the attention, or if
    T / (T + P) >= 2 K / H - 4 T BW / (N C e), when it moves less than queries and partial results would.
    With P = 0 the causal half doubles the first threshold. Where transfers take the cores that compute, nothing
    hides: then whichever moves fewer bytes.
    """
    if group.window is not None:
        cached = min(cached, group.window)
    heads, kv_heads = group.num_heads, group.num_kv_heads
    if not machine.overlaps:
        keys = (new + cached) * kv_heads * (group.key_dim + group.value_dim) * machine.element_bytes
        partials = 4 * (group.value_dim + 1)
        return keys <= new * heads * (group.key_dim * machine.element_bytes + partials)
    compute = ranks * machine.flops * machine.element_bytes
    hidden_from = compute * kv_heads / (2 * heads * machine.link_bytes_per_s)
    if new >= (hidden_from if cached else 2 * hidden_from):
        return True
    return new / (new + cached) >= 2 * kv_heads / heads - 4 * new * machine.link_bytes_per_s / compute


class CostModel:
    """Answers what work costs, in FLOPs from the model's shape and in seconds from the steps that were run."""

    def __init__(self, groups: Sequence[LayerGroup], linear_flops_per_token: float, ring_size: int,
                 machine: Machine, forced: Mode | None = None) -> None:
        self.groups, self.ring_size, self.machine = groups, ring_size, machine
        self._linear = linear_flops_per_token
        self._forced = forced
        self._steps = _Line()

    def modes(self, new: int, cached: int) -> list[Mode]:
        """What travels, per layer group, when `new` tokens of a request attend to `cached` earlier ones.

        A single row never moves keys: decode is always a query exchange."""
        if new == 1:
            return ["pass-q"] * len(self.groups)
        if self._forced is not None:
            return [self._forced] * len(self.groups)
        return ["pass-kv" if passes_kv(new, cached, group, self.ring_size, self.machine) else "pass-q"
                for group in self.groups]

    def flops(self, start: int, stop: int) -> float:
        """To compute the tokens [start, stop) of one request."""
        total = self._linear * (stop - start)
        for group in self.groups:
            per_pair = 2 * group.num_heads * (group.key_dim + group.value_dim) * len(group.layers)
            total += per_pair * (_pairs(stop, group.window) - _pairs(start, group.window))
        return total

    def observe(self, flops: float, seconds: float) -> None:
        """A step took `seconds` for `flops`. Steps that only decode say nothing of a prefill: leave them out."""
        self._steps.add(flops, seconds)

    def seconds(self, flops: float, steps: int) -> float | None:
        """For that much work in so many steps; None while nothing has been measured."""
        return self._steps.predict(flops, steps)


class _Line:
    """seconds = constant * steps + slope * flops: least squares over the latest steps, weights falling by age."""

    def __init__(self, memory: float = 0.95) -> None:
        self._memory = memory
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("_n", 1.0), ("_x", x), ("_y", y), ("_xx", x * x), ("_xy", x * y)):
            setattr(self, name, self._memory * getattr(self, name) + value)

    def predict(self, x: float, count: int) -> float | None:
        if self._n == 0 or self._x == 0:
            return None
        spread = self._n * self._xx - self._x * self._x
        slope = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-3 * self._x * self._x else -1.0
        constant = (self._y - slope * self._x) / self._n
        if slope <= 0 or constant < 0:  # steps too alike, or too noisy, to tell the two apart
            slope, constant = self._y / self._x, 0.0
        return constant * count + slope * x


def _pairs(tokens: int, window: int | None) -> float:
    """Visible (row, key) pairs of a causal square of `tokens`."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
