"""Metrics that do not grow with the length of a run: quantile sketch, load over time."""

from __future__ import annotations

from math import ceil, log

from kvist.sim.base import Summary

_ERROR = 0.005  # relative, of every quantile
_GAMMA = (1 + _ERROR) / (1 - _ERROR)
_SCALE = 1 / log(_GAMMA)
_ZERO = 1e-9  # seconds at or below this count as 0


class Sketch:
    """A histogram with logarithmic buckets: quantiles within 0.5 %, at most a few thousand counters.

    The construction of DDSketch (Masson, Rim, Lee, VLDB 2019).
    """

    __slots__ = ("buckets", "count", "max", "total", "zeros")

    def __init__(self) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.max = 0.0
        self.zeros = 0

    def add(self, value: float) -> None:
        """Count one value of at least 0."""
        self.count += 1
        self.total += value
        if value > self.max:
            self.max = value
        if value <= _ZERO:
            self.zeros += 1
            return
        bucket = ceil(log(value) * _SCALE)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1

    def quantile(self, q: float) -> float:
        """The value of rank q * (count - 1), 0 <= q <= 1; 0 without values."""
        return self.quantiles((q,))[0]

    def quantiles(self, qs: tuple[float, ...]) -> list[float]:
        """Several quantiles, in ascending order of q, in one pass."""
        found: list[float] = []
        seen = self.zeros
        ordered = iter(sorted(self.buckets.items()))
        value = 0.0
        for q in qs:
            rank = q * (self.count - 1)
            while seen <= rank and self.count:
                bucket, number = next(ordered)
                seen += number
                value = min(2 * _GAMMA**bucket / (_GAMMA + 1), self.max)
            found.append(value)
        return found

    def summary(self) -> Summary:
        if not self.count:
            return Summary()
        p50, p90, p95, p99 = self.quantiles((0.5, 0.9, 0.95, 0.99))
        return Summary(self.count, self.total / self.count, p50, p90, p95, p99, self.max)


class LoadSeries:
    """Mean number of requests in flight per worker and time bucket; buckets double in width as time goes on.

    At most `points` buckets are kept, so a series costs the same for a minute and for a month.
    """

    def __init__(self, start: float, points: int, width: float = 0.05) -> None:
        self.start = start
        self.points = points
        self.width = width
        self._area: dict[str, list[float]] = {}
        self._level: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._end = start + width * points

    def change(self, worker: str, now: float, delta: int) -> None:
        """`delta` more requests are in flight on `worker` from `now` on; `now` never falls."""
        if worker in self._area:
            self._fill(worker, now)
            self._level[worker] += delta
        else:
            self._area[worker] = [0.0] * self.points
            self._level[worker] = delta
        self._since[worker] = now

    def finish(self, now: float) -> dict[str, list[float]]:
        """Mean levels up to `now`, and under `time` the start of each bucket in seconds from the start."""
        for worker in self._area:
            self._fill(worker, now)
            self._since[worker] = now
        used = max(min(ceil((now - self.start) / self.width), self.points), 0)
        series = {"time": [i * self.width for i in range(used)]}
        for worker, area in self._area.items():
            means = [part / self.width for part in area[:used]]
            if used:
                rest = now - self.start - (used - 1) * self.width
                means[-1] = area[used - 1] / rest
            series[worker] = means
        return series

    def _fill(self, worker: str, now: float) -> None:
        while now > self._end:
            self._fold()
        level, at = self._level[worker], self._since[worker]
        if not level:
            return
        area, width = self._area[worker], self.width
        bucket = int((at - self.start) / width)
        while bucket < self.points - 1 and self.start + (bucket + 1) * width < now:
            edge = self.start + (bucket + 1) * width
            area[bucket] += level * (edge - at)
            at = edge
            bucket += 1
        area[min(bucket, self.points - 1)] += level * (now - at)

    def _fold(self) -> None:
        """Twice the width: pairs of buckets become one."""
        self.width *= 2
        self._end = self.start + self.width * self.points
        for worker, area in self._area.items():
            pairs = [sum(area[i : i + 2]) for i in range(0, self.points, 2)]
            self._area[worker] = pairs + [0.0] * (self.points - len(pairs))
