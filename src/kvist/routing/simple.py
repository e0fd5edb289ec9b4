"""Rules that look at no cache: random, round_robin, least_load, power_of_two."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.model import Query
from kvist.routing.base import Candidate, Decision, RoutingPolicy
from kvist.routing.choice import smallest


class RandomChoice(RoutingPolicy):
    name = "random"
    description = "A uniformly random worker."
    source = "paper section 4, baseline"
    needs_index = False

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        worker = candidates[int(self.rng.random() * len(candidates))].worker
        return Decision(worker.id, 0, reason="random")


class RoundRobin(RoutingPolicy):
    name = "round_robin"
    description = "One worker after the other."
    source = "paper section 4, baseline"
    needs_index = False

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._turn = 0

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        worker = candidates[self._turn % len(candidates)].worker
        self._turn += 1
        return Decision(worker.id, 0, reason="its turn")


class LeastLoad(RoutingPolicy):
    name = "least_load"
    description = "The worker with the fewest requests in flight, a random one of equals."
    source = "SMG policies/least_load"
    needs_index = False

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        scores = [candidate.worker.requests for candidate in candidates]
        return smallest(scores, candidates, self.rng, reason="fewest in flight")


class PowerOfTwo(RoutingPolicy):
    name = "power_of_two"
    description = "The less loaded of two random workers."
    source = "SMG policies/power_of_two; Mitzenmacher 2001"
    needs_index = False

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        pair = self.rng.sample(candidates, 2) if len(candidates) > 1 else candidates
        scores = [candidate.worker.requests for candidate in pair]
        return smallest(scores, pair, self.rng, reason="the less loaded of two")
