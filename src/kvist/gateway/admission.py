"""Who may come in now: a bound on requests under way, a bounded queue before it, rate limits per key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue. `start` runs when its turn comes, `refuse` when it has waited too long."""

    start: Callable[[], None]
    refuse: Callable[[], None]
    deadline: float
    gone: bool = False


class Admission:
    """At most `most` requests under way and `queue` waiting; higher priority first, then first come."""

    def __init__(self, most: int, queue: int, timeout: float) -> None:
        self.most = most
        self.queue = queue
        self.timeout = timeout
        self.active = 0
        self.waiting = 0
        self._heap: list[tuple[int, int, Waiting]] = []
        self._turn = 0

    def enter(self) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if self.active < self.most and not self.waiting:
            self.active += 1
            return True
        return False

    def wait(
        self, priority: int, now: float, start: Callable[[], None], refuse: Callable[[], None]
    ) -> Waiting | None:
        """Queue up; None if the queue is full."""
        if self.waiting >= self.queue:
            return None
        entry = Waiting(start, refuse, now + self.timeout)
        self._turn += 1
        heappush(self._heap, (-priority, self._turn, entry))
        self.waiting += 1
        return entry

    def leave(self) -> None:
        """A request ended; the next one starts."""
        self.active -= 1
        while self._heap and self.active < self.most:
            _, _, entry = heappop(self._heap)
            if not entry.gone:
                entry.gone = True
                self.waiting -= 1
                self.active += 1
                entry.start()

    def cancel(self, entry: Waiting) -> None:
        """The client left while it waited."""
        if not entry.gone:
            entry.gone = True
            self.waiting -= 1

    def sweep(self, now: float) -> None:
        """Refuse those who have waited too long."""
        for _, _, entry in self._heap:
            if not entry.gone and now >= entry.deadline:
                entry.gone = True
                self.waiting -= 1
                entry.refuse()
        if len(self._heap) > 2 * self.waiting + 64:
            self._heap = sorted(item for item in self._heap if not item[2].gone)


class RateLimits:
    """A token bucket for each key: `rate` requests/s, `burst` at once. rate 0: no limit."""

    _MOST_KEYS = 10_000

    def __init__(self, rate: float, burst: int) -> None:
        self.rate = rate
        self.burst = float(burst or max(rate, 1.0))
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str, now: float) -> float:
        """0 if the request may pass, else the seconds after which one will."""
        if not self.rate:
            return 0.0
        left, at = self._buckets.pop(key, (self.burst, now))
        left = min(self.burst, left + (now - at) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._buckets[key] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > self._MOST_KEYS:  # the key not seen for longest has a full bucket by now
            del self._buckets[next(iter(self._buckets))]
        return wait
