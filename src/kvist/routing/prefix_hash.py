"""Consistent hashing of the prompt's front, with bounded load."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from math import ceil
from random import Random

from xxhash import xxh3_64_intdigest

from kvist.model import Query, WorkerState
from kvist.routing.base import Candidate, Decision, RoutingPolicy


class PrefixHash(RoutingPolicy):
    name = "prefix_hash"
    description = "Consistent hashing of the first tokens; a worker above the bounded load is passed over."
    source = "SMG policies/prefix_hash; Mirrokni et al. 2018, consistent hashing with bounded loads"
    needs_index = False
    params = {
        "prefix_tokens": "tokens that are hashed (256)",
        "load_factor": "a worker takes no more than this times the mean load (1.25)",
        "replicas": "points of each worker on the ring (100)",
    }

    def __init__(
        self,
        *,
        prefix_tokens: int = 256,
        load_factor: float = 1.25,
        replicas: int = 100,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if load_factor <= 1 or prefix_tokens < 1 or replicas < 1:
            raise ValueError("load_factor must exceed 1, prefix_tokens and replicas must be at least 1")
        self.prefix_tokens = prefix_tokens
        self.load_factor = load_factor
        self.replicas = replicas
        self._ring: list[tuple[int, str]] = []

    def worker_added(self, worker: WorkerState, now: float) -> None:
        self.worker_removed(worker, now)  # told of a worker twice, its points are still on the ring once
        for i in range(self.replicas):
            insort(self._ring, (xxh3_64_intdigest(f"{worker.id}#{i}".encode()), worker.id))

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        self._ring = [point for point in self._ring if point[1] != worker.id]

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        by_id = {candidate.worker.id: candidate.worker for candidate in candidates}
        total = sum(worker.in_flight for worker in by_id.values()) + 1
        bound = ceil(self.load_factor * total / len(by_id))
        key = xxh3_64_intdigest(query.salt + query.prompt[: self.prefix_tokens * query.unit])
        start = bisect_right(self._ring, (key, ""))
        for i in range(len(self._ring)):
            worker = by_id.get(self._ring[(start + i) % len(self._ring)][1])
            if worker is not None and worker.in_flight < bound:
                return Decision(worker.id, 0, reason="its place on the ring")
        least = min(by_id.values(), key=lambda worker: worker.in_flight)
        return Decision(least.id, 0, reason="none below the bound: fewest in flight")
