"""Garbage collection that stays out of the way of requests.

A collection looks at every object there is: 35 ms of CPU with a routing index of 80 000 edges, in which
nobody is answered. What requests leave behind is freed by reference counts, so collecting can wait for a
moment in which nothing is under way.
"""

from __future__ import annotations

import gc

IDLE_SECONDS = 60.0  # between collections while idle
WORTH_IT = 10_000  # objects made and not freed since the last one
TOO_MANY = 500_000  # of those: collect though requests are under way


class Garbage:
    """For the process that serves: changes the interpreter's settings."""

    def __init__(self, now: float) -> None:
        gc.collect()
        gc.freeze()  # modules and code: never garbage
        gc.disable()
        self._at = now

    def sweep(self, now: float, *, idle: bool) -> bool:
        """Called now and then; whether a collection was made."""
        new = gc.get_count()[0]
        if new < (WORTH_IT if idle and now - self._at >= IDLE_SECONDS else TOO_MANY):
            return False
        gc.collect()
        self._at = now
        return True
