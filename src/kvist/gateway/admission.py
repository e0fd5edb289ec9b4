"""Who may come in now: a bound on requests under way, a bounded queue before it, rate limits per key."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue. `start` runs when its turn comes, `refuse` when it has waited too long."""

    start: Callable[[], None]
    refuse: Callable[[], None]
    deadline: float
    gone: bool = False


class Admission:
    """At most `most` requests under way (0: no bound) and `queue` waiting, for `timeout` seconds each.

    Higher priority first; flows (API keys, fairness ids) of one priority take turns; each flow is first come,
    first served. All is O(1) but the search for the highest priority that waits, O(priorities).
    """

    def __init__(self, most: int, queue: int, timeout: float) -> None:
        self.most = most
        self.queue = queue
        self.timeout = timeout
        self.active = 0
        self.waiting = 0
        self._bands: dict[int, OrderedDict[str, deque[Waiting]]] = {}

    @property
    def saturated(self) -> bool:
        return bool(self.most) and (self.active >= self.most or self.waiting > 0)

    def enter(self) -> bool:
        """Take a place if one is free and nobody waits for it."""
        if self.saturated:
            return False
        self.active += 1
        return True

    def wait(
        self, priority: int, flow: str, now: float, start: Callable[[], None], refuse: Callable[[], None]
    ) -> Waiting | None:
        """Queue up; None if the queue is full."""
        if self.waiting >= self.queue:
            return None
        entry = Waiting(start, refuse, now + self.timeout)
        self._bands.setdefault(priority, OrderedDict()).setdefault(flow, deque()).append(entry)
        self.waiting += 1
        return entry

    def leave(self) -> None:
        """A request ended; the next may start."""
        self.active -= 1
        self.admit()

    def admit(self) -> None:
        """Start those who wait while there is room (call after raising `most`)."""
        while self.waiting and (not self.most or self.active < self.most):
            entry = self._next()
            if entry is None:
                return
            entry.gone = True
            self.waiting -= 1
            self.active += 1
            entry.start()

    def _next(self) -> Waiting | None:
        while self._bands:
            priority = max(self._bands)
            flows = self._bands[priority]
            while flows:
                flow, line = flows.popitem(last=False)
                while line and line[0].gone:
                    line.popleft()
                if line:
                    entry = line.popleft()
                    if line:
                        flows[flow] = line  # behind the other flows
                    elif not flows:
                        del self._bands[priority]
                    return entry
            del self._bands[priority]
        return None

    def cancel(self, entry: Waiting) -> None:
        """The client left while it waited."""
        if not entry.gone:
            entry.gone = True
            self.waiting -= 1

    def sweep(self, now: float) -> None:
        """Refuse those who have waited too long, and forget those who left."""
        for priority in list(self._bands):
            flows = self._bands[priority]
            for flow in list(flows):
                line = flows[flow]
                while line and (line[0].gone or now >= line[0].deadline):  # each line is in order of deadline
                    entry = line.popleft()
                    if not entry.gone:
                        entry.gone = True
                        self.waiting -= 1
                        entry.refuse()
                if not line:
                    del flows[flow]
            if not flows:
                del self._bands[priority]


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
