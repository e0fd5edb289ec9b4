"""In which order an engine admits waiting requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvist.engine.core import Engine, Request

_MAX_SORTED = 128  # waiting requests above which sorting by prefix costs more than it brings (as in SGLang)

QueueOrder = Callable[["list[Request]", "Engine", float], None]


def fcfs(waiting: list[Request], engine: Engine, now: float) -> None:
    """First come, first served; preempted requests first."""


def lpm(waiting: list[Request], engine: Engine, now: float) -> None:
    """Longest cached prefix first (SGLang schedule_policy.py), FCFS when many wait."""
    if 1 < len(waiting) <= _MAX_SORTED:
        peek = engine.cache.peek
        waiting.sort(key=lambda r: (not r.preempted, -peek(r.query.prompt, r.query.salt)))


def shortest(waiting: list[Request], engine: Engine, now: float) -> None:
    """Least uncached prompt first, aged so that nobody starves: a second of waiting is worth 1000 tokens."""
    if 1 < len(waiting) <= _MAX_SORTED:
        peek = engine.cache.peek

        def left(request: Request) -> float:
            miss = request.query.length - peek(request.query.prompt, request.query.salt)
            return miss - 1000.0 * (now - request.submitted)

        waiting.sort(key=lambda r: (not r.preempted, left(r)))


QUEUES: dict[str, QueueOrder] = {"fcfs": fcfs, "lpm": lpm, "shortest": shortest}
