"""SkyLB's (SkyWalker's) rule inside a region: longest prefix among the workers without a queue."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.model import Query
from kvist.routing.base import Candidate, Decision, RoutingPolicy
from kvist.routing.choice import smallest


class SkyLB(RoutingPolicy):
    """Selective pushing: only workers without pending requests are pushed to.

    SkyLB probes the workers' queues; here a request is pending until its first token, and one at a time (the
    one that is being computed) does not count as a queue. While every worker has a queue SkyLB holds requests
    back; a policy must decide, so then the shortest queues count as available.
    """

    name = "skylb"
    description = "Longest prefix among workers without a queue; fewest in flight if it is short."
    source = "SkyLB / SkyWalker, Xia et al. 2025, arXiv 2505.24095, selective pushing by pending requests"
    params = {
        "pending": "requests before their first token that are no queue (1)",
        "threshold": "share of the prompt that must match to follow the prefix (0.5)",
    }

    def __init__(self, *, pending: int = 1, threshold: float = 0.5, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        if pending < 0 or not 0 <= threshold <= 1:
            raise ValueError("pending must be at least 0 and threshold between 0 and 1")
        self.pending = pending
        self.threshold = threshold

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        least = max(min(candidate.worker.waiting for candidate in candidates), self.pending)
        available = [candidate for candidate in candidates if candidate.worker.waiting <= least]
        longest = max(candidate.cached for candidate in available)
        if longest >= self.threshold * query.length:
            available = [candidate for candidate in available if candidate.cached == longest]
        loads = [candidate.worker.requests for candidate in available]
        return smallest(loads, available, self.rng, reason="available: longest prefix, then fewest in flight")
