"""What a request's prefill costs the others: the congestion price."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt


def delayed(waiting: Sequence[int], wait: Sequence[float]) -> float:
    """How many requests a second of computing delays.

    waiting: requests before their first token, per worker. wait: seconds to the first token of a usual
    request there, less what the fastest worker would need if it were idle; the least is what a newcomer is
    delayed at best.

    Between nobody (while a worker is free that is as good as any, later requests go round the busy one) and
    the mean queue (all workers busy: every second of work is a second for all who wait): the mean queue times
    the square root of how far the least wait is from the usual one.
    """
    total = sum(waiting)
    if not total:
        return 0.0
    usual = sum([n * w for n, w in zip(waiting, wait, strict=True)]) / total
    if usual <= 0:
        return 0.0
    return total / len(waiting) * sqrt(min(max(min(wait), 0.0) / usual, 1.0))
