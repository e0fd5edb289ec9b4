"""A circuit breaker for each worker."""

from __future__ import annotations


class Breaker:
    """closed -> (threshold failures in a row) -> open -> (after `seconds`) -> half-open -> closed or open.

    Half-open lets one request through; its end decides.
    """

    def __init__(self, threshold: int, seconds: float) -> None:
        self.threshold = threshold
        self.seconds = seconds
        self.failures = 0
        self.opened_at: float | None = None
        self.trial = False

    def state(self, now: float) -> str:
        if self.opened_at is None:
            return "closed"
        return "half_open" if now - self.opened_at >= self.seconds else "open"

    def allows(self, now: float) -> bool:
        state = self.state(now)
        return state == "closed" or (state == "half_open" and not self.trial)

    def sent(self, now: float) -> None:
        if self.state(now) == "half_open":
            self.trial = True

    def succeeded(self) -> None:
        self.failures, self.opened_at, self.trial = 0, None, False

    def failed(self, now: float) -> None:
        self.failures += 1
        self.trial = False
        if self.failures >= self.threshold:
            self.opened_at = now

    def released(self) -> None:
        """The request ended without saying anything of the worker (the client left)."""
        self.trial = False
