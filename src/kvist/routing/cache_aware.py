"""SGLang's rule: stay with the longest prefix unless the load is out of balance."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.model import Query
from kvist.routing.base import Candidate, Decision, RoutingPolicy
from kvist.routing.choice import smallest


class CacheAware(RoutingPolicy):
    name = "cache_aware"
    description = (
        "Longest prefix if long enough and the load is balanced; else fewest in flight / smallest tree."
    )
    source = "sglang-router 0.3 policies/cache_aware.rs; the authors' baseline"
    params = {
        "cache_threshold": "share of the prompt that must match to follow the prefix (0.3)",
        "balance_abs_threshold": "requests in flight between the extremes that count as imbalance (64)",
        "balance_rel_threshold": "… if the larger is also more than this times the smaller (1.5)",
    }

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if not 0 <= cache_threshold <= 1:
            raise ValueError(f"cache_threshold must lie between 0 and 1, not {cache_threshold}")
        self.cache_threshold = cache_threshold
        self.balance_abs_threshold = balance_abs_threshold
        self.balance_rel_threshold = balance_rel_threshold

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        loads = [candidate.worker.requests for candidate in candidates]
        low, high = min(loads), max(loads)
        if high - low > self.balance_abs_threshold and high > self.balance_rel_threshold * low:
            return smallest(loads, candidates, self.rng, reason="out of balance: fewest in flight")
        misses = [query.length - candidate.cached for candidate in candidates]
        if query.length - min(misses) > self.cache_threshold * query.length:
            return smallest(misses, candidates, self.rng, reason="longest prefix")
        sizes = [candidate.worker.cached_tokens for candidate in candidates]
        return smallest(sizes, candidates, self.rng, reason="no long prefix: smallest tree")
