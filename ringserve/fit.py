"""Fit: seconds of steps as a sum of seven features, learned while steps finish."""

from bisect import insort
from collections import deque

FEATURES = ("step", "request", "token", "flop", "key_byte", "sent_byte", "exchange")
N = len(FEATURES)
Vector = list[float]
"""[N]"""

MEMORY = 0.995
"""Weight of a step relative to the one after it: about 200 steps count."""
PRIOR_STEPS = 4.0
"""What was known at start counts as so many steps."""


class Errors:
    """The latest relative errors, for their median and tail."""

    def __init__(self, memory: int = 256) -> None:
        self._latest: deque[float] = deque(maxlen=memory)

    def add(self, error: float) -> None:
        self._latest.append(error)

    def quantile(self, q: float) -> float | None:
        if not self._latest:
            return None
        ordered: list[float] = []
        for error in self._latest:
            insort(ordered, error)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Fit:
    """Least squares on relative errors, no weight below zero, weights of steps falling by age, and a prior."""

    def __init__(self, prior: Vector) -> None:
        self.weights = list(prior)
        # Each weight near its prior, to within its own size: a ridge in relative terms. One that is 0 stays 0.
        self._gram = [[0.0] * N for _ in range(N)]
        self._moment = [0.0] * N
        self._prior = [(PRIOR_STEPS / 8 / w**2, PRIOR_STEPS / 8 / w) if w > 0 else (0.0, 0.0) for w in prior]
        self._pull = 1.0

    def add(self, features: Vector, seconds: float) -> None:
        scaled = [x / seconds for x in features]
        used = [i for i in range(N) if scaled[i]]
        gram, moment = self._gram, self._moment
        for i in range(N):
            row = gram[i]
            for j in range(N):
                row[j] *= MEMORY
            moment[i] *= MEMORY
        for i in used:
            row, x = gram[i], scaled[i]
            for j in used:
                row[j] += x * scaled[j]
            moment[i] += x
        self._pull = max(self._pull * MEMORY, 0.02)
        self._solve()

    def rescale(self, ratio: float) -> None:
        """As if every earlier step had taken `ratio` times as long."""
        self.weights[:] = [w * ratio for w in self.weights]
        self._gram = [[x / ratio**2 for x in row] for row in self._gram]
        self._moment = [x / ratio for x in self._moment]
        self._prior = [(precision / ratio**2, mean / ratio) for precision, mean in self._prior]

    def _solve(self) -> None:
        """Coordinate descent from the last solution: the problem is convex and small."""
        weights, pull = self.weights, self._pull
        for _ in range(4):
            for i in range(N):
                precision, mean = self._prior[i]
                row = self._gram[i]
                curvature = row[i] + precision * pull
                if curvature <= 0:
                    continue
                rest = self._moment[i] + mean * pull - dot(row, weights) + row[i] * weights[i]
                weights[i] = max(rest / curvature, 0.0)


def dot(a: Vector, b: Vector) -> float:
    return (a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3] + a[4] * b[4] + a[5] * b[5] + a[6] * b[6])
