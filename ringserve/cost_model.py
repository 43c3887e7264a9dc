"""CostModel: the one place that knows what work costs, in seconds. No torch.

A step's seconds are linear in what its busiest rank has to do, whatever the model:

    constant + per request + per token (linear layers) + per attended pair + per byte of keys read
             + per byte sent + per exchange

Ranks that a wide request joins meet in every layer, so a step lasts as long as its busiest rank; the layers of one
step share their work in the same proportions, so the largest sum stands for the sum of the largest. Seven numbers are
fitted online by least squares on relative errors, weights falling by age, starting from what was measured at start or
was learned by an earlier server on the same machine.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ringserve.fit import FEATURES, PRIOR_STEPS, Errors, Fit, N, Vector, dot
from ringserve.plan import LayerGroup, Mode

STEP, REQUEST, TOKEN, FLOP, KEY_BYTE, SENT_BYTE, EXCHANGE = range(N)

OUTLIER = 4.0
"""A step that took longer than this times its prediction (the machine was busy with something else) is cut to it."""
DRIFT_STEPS, DRIFT = 16, 1.25
"""When the middle one of so many steps is off by this factor, the machine has become slower or faster: everything is
scaled at once, where the fit alone would believe the old steps for long."""
LEAST_S = 1e-6
"""No step is predicted to take less: a fit may believe for a while that one costs nothing."""
FITTING = 0.9
MARGIN_STEPS = 8
MOST_MARGIN = 1.5
SAMPLES = 12
"""Points at which the cost of a long prefill is integrated."""


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
    key_bytes_per_s: float = 8e9
    """At which a rank reads its keys."""
    step_s: float = 2e-3
    request_s: float = 4e-4
    exchange_s: float = 5e-5


def passes_kv(new: int, cached: int, group: LayerGroup, ranks: int, machine: Machine) -> bool:
    """Whether keys should travel instead of queries (Yang et al. 2024, 2411.01783, algorithm 5), for one chunk.

    pass-KV if T >= N C K e / (2 H BW), when its transfer hides behind the attention, or if
    T / (T + P) >= 2 K / H - 4 T BW / (N C e), when it moves less than queries and partial results would.
    With P = 0 the causal half doubles the first threshold. Where transfers take the cores that compute, nothing
    hides: then whichever moves fewer bytes.
    """
    if group.window is not None:
        cached = min(cached, group.window)
    if not machine.overlaps:
        return (new + cached) * group.key_bytes <= new * query_bytes(group, machine)
    heads, kv_heads = group.num_heads, group.num_kv_heads
    compute = ranks * machine.flops * machine.element_bytes
    hidden_from = compute * kv_heads / (2 * heads * machine.link_bytes_per_s)
    if new >= (hidden_from if cached else 2 * hidden_from):
        return True
    return new / (new + cached) >= 2 * kv_heads / heads - 4 * new * machine.link_bytes_per_s / compute


def query_bytes(group: LayerGroup, machine: Machine) -> float:
    """Of one row that travels and the partial result (fp32) that comes home, in one layer."""
    return group.num_heads * (group.key_dim * machine.element_bytes + 4 * (group.value_dim + 1))


class StepCost:
    """What a step asks of each rank, added up request by request: [ranks][features] without the constant."""

    __slots__ = ("_model", "ranks")

    def __init__(self, model: "CostModel") -> None:
        self._model = model
        self.ranks = [[0.0] * N for _ in range(model.ring_size)]

    def add(self, work: "Sequence[tuple[int, Vector]]") -> None:
        for rank, features in work:
            row = self.ranks[rank]
            for i in range(1, N):
                row[i] += features[i]

    def features(self) -> Vector:
        """Of the busiest rank, with the constant."""
        weights = self._model.weights
        busiest = max(self.ranks, key=lambda row: dot(row, weights))
        return [1.0, *busiest[1:]]

    def seconds(self, work: "Sequence[tuple[int, Vector]]" = ()) -> float:
        """Predicted, with this added."""
        weights = self._model.weights
        more = dict(work)
        best = 0.0
        for rank, row in enumerate(self.ranks):
            total = dot(row, weights)
            if rank in more:
                total += dot(more[rank], weights)
            best = max(best, total)
        return best + weights[STEP]


class CostModel:
    """Answers what work costs: in FLOPs from the model's shape, in seconds from the steps that were run."""

    def __init__(self, groups: Sequence[LayerGroup], linear_flops_per_token: float, ring_size: int,
                 machine: Machine, forced: Mode | None = None) -> None:
        self.groups, self.ring_size, self.machine = groups, ring_size, machine
        self.linear_flops = linear_flops_per_token
        self._forced = forced
        self._layers = sum(len(group.layers) for group in groups)
        link = 0.0 if math.isinf(machine.link_bytes_per_s) else 1.0 / machine.link_bytes_per_s
        prior = [machine.step_s, machine.request_s, linear_flops_per_token / machine.flops, 1.0 / machine.flops,
                 1.0 / machine.key_bytes_per_s, link, machine.exchange_s]
        self._fit = Fit(prior)
        self._fitted = machine
        self.errors = Errors()
        """Of the predictions of finished steps, |predicted - measured| / measured."""
        self._latest: list[float] = []
        """Measured over predicted seconds of the steps since these were last looked at."""
        self._overruns = Errors(64)
        self.margin = 1.0
        """What nine of ten of the latest steps stayed below, over their prediction: for budgets that must hold."""
        self.steps = 0
        """That were observed."""

    @property
    def kv_bytes_per_token(self) -> float:
        return sum(group.key_bytes * len(group.layers) for group in self.groups)

    @property
    def weights(self) -> Vector:
        """Seconds per unit of each feature."""
        return self._fit.weights

    # What work there is

    def modes(self, new: int, cached: int, width: int | None = None) -> list[Mode]:
        """What travels, per layer group, when `new` tokens of a request attend to `cached` earlier ones.

        A single row never moves keys: decode is always a query exchange."""
        if new == 1:
            return ["pass-q"] * len(self.groups)
        if self._forced is not None:
            return [self._forced] * len(self.groups)
        return ["pass-kv" if passes_kv(new, cached, group, width or self.ring_size, self._fitted) else "pass-q"
                for group in self.groups]

    def _fitted_machine(self) -> Machine:
        """The machine as the finished steps show it: the rule's numbers are what was measured, then learned."""
        flop, sent = self.weights[FLOP], self.weights[SENT_BYTE]
        if not self.machine.overlaps or flop <= 0 or sent <= 0:
            return self.machine
        return replace(self.machine, flops=1 / flop, link_bytes_per_s=1 / sent)

    def flops(self, start: int, stop: int) -> float:
        """To compute the tokens [start, stop) of one request."""
        total = self.linear_flops * (stop - start)
        for group in self.groups:
            per_pair = 2 * group.num_heads * (group.key_dim + group.value_dim) * len(group.layers)
            total += per_pair * (_pairs(stop, group.window) - _pairs(start, group.window))
        return total

    def work(self, start: int, tokens: Sequence[int], held: Sequence[int]) -> list[tuple[int, Vector]]:
        """What computing the next tokens of a request asks of each rank: `tokens` [ranks] of them lie on each,
        from position `start` on, and `held` [ranks] keys lie there already."""
        new, cached = sum(tokens), sum(held)
        involved = [r for r in range(self.ring_size) if tokens[r] or held[r]]
        modes = self.modes(new, start, len(involved))
        rows = {rank: [0.0] * N for rank in involved}
        for rank, features in rows.items():
            features[REQUEST] = 1.0
            features[TOKEN] = tokens[rank]
        others = len(involved) - 1
        for group, mode in zip(self.groups, modes):
            layers = len(group.layers)
            reach = cached + new if group.window is None else min(cached + new, group.window + new)
            seen = reach / (cached + new)
            per_key, per_query = float(group.key_bytes * layers), query_bytes(group, self.machine) * layers
            pairs = _pairs(start + new, group.window) - _pairs(start, group.window)
            flops = 2 * group.num_heads * (group.key_dim + group.value_dim) * layers * pairs
            for rank, features in rows.items():
                mine, keys = tokens[rank], (held[rank] + tokens[rank]) * seen
                if mode == "pass-kv":
                    costs = (flops * mine / new, reach * per_key if mine else 0.0, others * keys * per_key)
                    features[EXCHANGE] += others * layers
                else:
                    costs = (flops * (keys / reach if others else 1.0), keys * per_key, others * mine * per_query)
                    features[EXCHANGE] += 2 * others * layers
                flop, read, sent = self._beside_each_other(*costs)
                features[FLOP] += flop
                features[KEY_BYTE] += read
                features[SENT_BYTE] += sent
        return list(rows.items())

    def _beside_each_other(self, flops: float, key_bytes: float, sent_bytes: float) -> tuple[float, float, float]:
        """Where computing, reading and sending overlap, only the slowest of the three costs time."""
        if not self.machine.overlaps:
            return flops, key_bytes, sent_bytes
        m = self.machine
        compute, read, send = flops / m.flops, key_bytes / m.key_bytes_per_s, sent_bytes / m.link_bytes_per_s
        if compute >= read and compute >= send:
            return flops, 0.0, 0.0
        return (0.0, key_bytes, 0.0) if read >= send else (0.0, 0.0, sent_bytes)

    # Seconds

    def observe(self, features: Vector, seconds: float) -> None:
        """A step with these features took so long."""
        predicted = max(dot(features, self.weights), LEAST_S)
        self.errors.add(abs(predicted - seconds) / seconds)
        self._overruns.add(seconds / predicted)
        self.steps += 1
        if self.steps % MARGIN_STEPS == 0:
            self.margin = min(max(self._overruns.quantile(FITTING) or 1.0, 1.0), MOST_MARGIN)
        self._latest.append(seconds / predicted)
        if len(self._latest) == DRIFT_STEPS:
            ratio = sorted(self._latest)[DRIFT_STEPS // 2]
            self._latest.clear()
            if not 1 / DRIFT <= ratio <= DRIFT:
                self._fit.rescale(ratio)
        self._fit.add(features, min(seconds, OUTLIER * predicted) if self.steps > PRIOR_STEPS else seconds)
        self._fitted = self._fitted_machine()

    def chunk_seconds(self, start: int, new: int, width: int) -> float:
        """Of a step with nothing but `new` tokens of one request from `start` on, its blocks spread evenly."""
        # One rank with the mean of all stands for every one of them.
        weights = self.weights
        total = weights[STEP] + weights[REQUEST] + weights[TOKEN] * new / width
        modes = self.modes(new, start, width)
        for group, mode in zip(self.groups, modes):
            layers = len(group.layers)
            reach = start + new if group.window is None else min(start + new, group.window + new)
            per_key, per_query = float(group.key_bytes * layers), query_bytes(group, self.machine) * layers
            pairs = _pairs(start + new, group.window) - _pairs(start, group.window)
            flops = 2 * group.num_heads * (group.key_dim + group.value_dim) * layers * pairs / width
            others = width - 1
            if mode == "pass-kv":
                costs = (flops, reach * per_key, others * reach * per_key / width)
                total += others * weights[EXCHANGE] * layers
            else:
                costs = (flops, reach * per_key / width, others * new * per_query / width)
                total += 2 * others * weights[EXCHANGE] * layers
            flop, read, sent = self._beside_each_other(*costs)
            total += weights[FLOP] * flop + weights[KEY_BYTE] * read + weights[SENT_BYTE] * sent
        return total

    def chunk_tokens(self, start: int, width: int, budget_s: float, most: int, unit: int) -> int:
        """The largest chunk from `start` on whose step fits the budget: at least `unit`, at most `most`."""
        if most <= unit or self.chunk_seconds(start, most, width) <= budget_s:
            return most
        least_s = self.chunk_seconds(start, unit, width)
        if least_s >= budget_s:
            return unit
        # Seconds grow a little faster than tokens: secants from `unit` close in from above.
        tokens = most
        for _ in range(5):
            seconds = self.chunk_seconds(start, tokens, width)
            if seconds <= budget_s:
                break
            slope = (seconds - least_s) / (tokens - unit)
            tokens = max(unit, min(tokens - 1, unit + int((budget_s - least_s) / slope)))
            if tokens == unit:
                break
            if self.chunk_seconds(start, tokens, width) < budget_s:
                # Below now: what is between the two points is nearly a line.
                low_s = self.chunk_seconds(start, tokens, width)
                slope = (low_s - least_s) / (tokens - unit)
                if slope <= 0:  # a fit with nothing that grows with tokens
                    break
                tokens = min(most, max(tokens, unit + int((budget_s - least_s) / slope)))
        while tokens > unit and self.chunk_seconds(start, tokens, width) > budget_s:
            tokens = max(unit, int(tokens * 0.98))
        return tokens

    def prefill_seconds(self, start: int, stop: int, width: int, budget_s: float, most: int, unit: int) -> float:
        """To compute the tokens [start, stop) of a request with nothing else on the ring, in the chunks that the
        budget allows: the integral over the positions of seconds per token."""
        if stop <= start:
            return 0.0
        if self.chunk_seconds(start, stop - start, width) <= budget_s and stop - start <= most:
            return self.chunk_seconds(start, stop - start, width)
        points = [start + (stop - start) * (i + 0.5) / SAMPLES for i in range(SAMPLES)]
        slope = 0.0
        for point in map(int, points):
            chunk = min(self.chunk_tokens(point, width, budget_s, most, unit), stop - start)
            slope += self.chunk_seconds(point, chunk, width) / chunk
        return slope / SAMPLES * (stop - start)

    def decode_seconds(self, keys: int, width: int) -> float:
        """What one token of a decoding request adds to a step."""
        return self.chunk_seconds(keys, 1, width) - self.weights[STEP]

    def copy_seconds(self, tokens: int) -> float:
        """To copy the keys of so many tokens from one rank to another."""
        return self.weights[SENT_BYTE] * tokens * self.kv_bytes_per_token + self.weights[EXCHANGE] * self._layers

    # What outlives the server

    def save(self, path: Path) -> None:
        """Write what was learned, whole or not at all. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"features": FEATURES, "weights": self.weights, "steps": self.steps}))
        scratch.replace(path)

    def load(self, path: Path) -> bool:
        """Start from what was learned before. False when there is nothing that can be read."""
        try:
            known = json.loads(path.read_text())
            weights = [float(w) for w in known["weights"]]
            sound = len(weights) == N and all(math.isfinite(w) and w >= 0 for w in weights)
            if tuple(known["features"]) != FEATURES or not sound:
                return False
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return False
        self._fit = Fit([w or old for w, old in zip(weights, self.weights)])
        return True


def _pairs(tokens: float, window: int | None) -> float:
    """Visible (row, key) pairs of a causal square of `tokens`."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window
