"""What the workers of a fleet teach each other.

Each worker has a vector of learned numbers; how far the first is off by chance is known as a variance. `draw`
moves a worker's vector towards the fleet's mean, weighted by precision, by the share of the distance that
chance explains (positive-part James-Stein: variance / distance squared). In a fleet of equals everybody
learns from everybody; a worker that is clearly different stands for itself. The vector is moved as one, since
its numbers were learned together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

Vector = tuple[float, ...]


class Pool:
    """Setting a worker's vector, and drawing one, costs O(numbers)."""

    __slots__ = ("_changes", "_plain", "_values", "_weight", "_weighted")

    def __init__(self, size: int) -> None:
        self._values: dict[Hashable, tuple[Vector, float]] = {}  # (vector, weight: 1 / variance by chance)
        self._plain = [0.0] * size
        self._weighted = [0.0] * size
        self._weight = 0.0
        self._changes = 0

    def __len__(self) -> int:
        return len(self._values)

    def set(self, worker: Hashable, vector: Sequence[float], chance: float) -> None:
        self.drop(worker)
        least = 1e-6 * vector[0] * vector[0] + 1e-18  # nothing is known better than to a part in a thousand
        new = (tuple(vector), 1.0 / max(chance, least))
        self._values[worker] = new
        self._count(*new, 1.0)
        self._changes += 1
        if self._changes % 1000 == 0:  # what rounding has left
            self._plain = [0.0] * len(self._plain)
            self._weighted = [0.0] * len(self._weighted)
            self._weight = 0.0
            for known in self._values.values():
                self._count(*known, 1.0)

    def drop(self, worker: Hashable) -> None:
        gone = self._values.pop(worker, None)
        if gone is not None:
            self._count(*gone, -1.0)

    def _count(self, vector: Vector, weight: float, sign: float) -> None:
        self._weight += sign * weight
        for k, value in enumerate(vector):
            self._plain[k] += sign * value
            self._weighted[k] += sign * weight * value

    def mean(self) -> Vector:
        """The plain mean, for a worker of which nothing is known. Needs a worker."""
        return tuple(total / len(self._values) for total in self._plain)

    def draw(self, worker: Hashable) -> Vector:
        """A known worker's vector, moved towards the mean; between the two in every number."""
        vector, weight = self._values[worker]
        if len(self._values) < 2 or self._weight <= 0:
            return vector
        centre = [total / self._weight for total in self._weighted]
        distance = vector[0] - centre[0]
        trust = max(1.0 - 1.0 / (weight * distance * distance), 0.0) if distance else 0.0
        return tuple(mean + trust * (value - mean) for mean, value in zip(centre, vector, strict=True))
