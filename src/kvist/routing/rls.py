"""Recursive least squares with forgetting, made safe for live traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, sqrt
from operator import mul

_CLIP = 3.0  # a residual counts no more than this many times the usual error (Huber)
_FIRST = 10.0  # before the usual error is known: no more than this many times the prediction
_SETTLING = 8  # observations before the usual error is trusted


class RecursiveLeastSquares:
    """y ~ theta . x for a few features, in plain Python (a numpy call costs more than the 4 x 4 arithmetic).

    prior: theta before any observation. spread: standard deviation of each coefficient's prior, in units of
    the observation noise; together: the same of a factor that all have in common, as parts of the prior.
    forgetting: weight of the past per observation. bounds: each coefficient is kept
    inside its own; none may be below 0. Non-finite observations are ignored; outliers are clipped; the
    covariance never grows above its start, so a quiet direction does not blow up under forgetting.
    """

    def __init__(
        self,
        prior: Sequence[float],
        spread: Sequence[float],
        bounds: Sequence[tuple[float, float]],
        forgetting: float,
        together: float = 0.0,
    ) -> None:
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting must lie in (0, 1], not {forgetting}")
        self.theta = list(prior)
        self.bounds = list(bounds)
        self.forgetting = forgetting
        self.observations = 0
        self.error = 0.0  # running mean of |residual|, the usual error
        common = [together * t for t in prior]
        self.covariance = [
            [a * b + (spread[i] ** 2 if i == j else 0.0) for j, b in enumerate(common)]
            for i, a in enumerate(common)
        ]
        self._start = [row[i] for i, row in enumerate(self.covariance)]

    def predict(self, x: Sequence[float]) -> float:
        return float(sum(map(mul, self.theta, x)))

    def update(self, x: Sequence[float], y: float) -> None:
        """Learn one observation."""
        residual = y - self.predict(x)
        if not isfinite(residual):
            return
        self.observations += 1
        size = abs(residual)
        if self.observations > _SETTLING:
            limit = _CLIP * self.error
            if size > limit:
                residual = limit if residual > 0 else -limit
                size = min(size, 2 * limit)  # a lasting change raises the usual error step by step
            self.error += 0.05 * (size - self.error)
        else:
            limit = _FIRST * (abs(y - residual) + 1e-3)
            if size > limit:  # the first answer of a cold engine is not how it will be
                residual = limit if residual > 0 else -limit
                size = limit
            self.error += (size - self.error) / self.observations
        rows = self.covariance
        forgetting = self.forgetting
        px = [sum(map(mul, row, x)) for row in rows]
        scale = forgetting + sum(map(mul, px, x))
        if not isfinite(scale) or scale <= 0:
            return
        step = residual / scale
        self.theta[:] = [t + p * step for t, p in zip(self.theta, px, strict=True)]
        for row, p in zip(rows, px, strict=True):
            row[:] = [(r - p * q / scale) / forgetting for r, q in zip(row, px, strict=True)]
        self._bound_theta()
        self._bound_covariance()

    def _bound_theta(self) -> None:
        """Back inside the bounds. What one coefficient may not explain, those that go with it take over."""
        theta, rows = self.theta, self.covariance
        for i, (low, high) in enumerate(self.bounds):
            off = min(max(theta[i], low), high) - theta[i]
            if off and rows[i][i] > 0:
                share = off / rows[i][i]
                for j, p in enumerate(rows[i]):
                    theta[j] += p * share
        for i, (low, high) in enumerate(self.bounds):
            theta[i] = min(max(theta[i], low), high)

    def _bound_covariance(self) -> None:
        """Shrink rows and columns whose variance passed its start; keeps the matrix positive definite."""
        rows = self.covariance
        for i, most in enumerate(self._start):
            if rows[i][i] > most:
                factor = sqrt(most / rows[i][i])
                for j in range(len(rows)):
                    rows[i][j] *= factor
                    rows[j][i] *= factor

    def dump(self) -> dict[str, object]:
        return {
            "theta": list(self.theta),
            "covariance": [list(row) for row in self.covariance],
            "error": self.error,
            "observations": self.observations,
        }

    def load(self, state: dict[str, object]) -> None:
        """Raises ValueError naming the field if the state does not fit."""
        n = len(self.theta)
        theta, rows = state.get("theta"), state.get("covariance")
        error, observations = state.get("error"), state.get("observations")
        if not _numbers(theta, n):
            raise ValueError(f"theta: {n} finite numbers expected")
        if not isinstance(rows, list) or len(rows) != n or not all(_numbers(row, n) for row in rows):
            raise ValueError(f"covariance: {n} x {n} finite numbers expected")
        if not isinstance(error, (int, float)) or not isfinite(error) or error < 0:
            raise ValueError("error: a non-negative number expected")
        if not isinstance(observations, int) or observations < 0:
            raise ValueError("observations: a count expected")
        assert isinstance(theta, list)
        bounded = zip(theta, self.bounds, strict=True)
        self.theta = [min(max(float(t), low), high) for t, (low, high) in bounded]
        self.covariance = [[float(v) for v in row] for row in rows]
        self.error, self.observations = float(error), observations


def checked(
    dumps: Mapping[str, object], fresh: Callable[[], RecursiveLeastSquares]
) -> dict[str, dict[str, object]]:
    """Dumps of models by worker that a fresh model can load. Raises ValueError naming worker and field."""
    found = {}
    for worker_id, dump in dumps.items():
        if not isinstance(dump, dict):
            raise ValueError(f"{worker_id}: an object with theta, covariance, … expected")
        try:
            fresh().load(dump)
        except ValueError as error:
            raise ValueError(f"{worker_id}.{error}") from None
        found[worker_id] = dump
    return found


def _numbers(value: object, n: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == n
        and all(isinstance(v, (int, float)) and isfinite(v) for v in value)
    )
