"""Rules that multiply or add cache and load with fixed weights: kv_score, lmetric."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from random import Random

from kvist.model import Query
from kvist.routing.base import Candidate, Decision, RoutingPolicy
from kvist.routing.choice import smallest


class KVScore(RoutingPolicy):
    name = "kv_score"
    description = "Prefill blocks still to compute plus decode blocks held, with fixed weights."
    source = "NVIDIA Dynamo lib/llm kv_router/scheduler.rs (cost = overlap weight * prefill + decode blocks)"
    params = {
        "overlap_weight": "weight of the prefill blocks (1.0)",
        "temperature": "0: the smallest cost; above: softmax over costs scaled to their range",
        "block_size": "tokens a block (16)",
    }

    def __init__(
        self,
        *,
        overlap_weight: float = 1.0,
        temperature: float = 0.0,
        block_size: int = 16,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if overlap_weight < 0 or temperature < 0:
            raise ValueError("overlap_weight and temperature must not be negative")
        self.overlap_weight = overlap_weight
        self.temperature = temperature
        self.block_size = block_size

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        costs = [
            (
                self.overlap_weight * (worker.pending_prefill + query.length - candidate.cached)
                + worker.in_flight_tokens
                + query.length
            )
            / self.block_size
            for candidate in candidates
            for worker in (candidate.worker,)
        ]
        decision = smallest(costs, candidates, self.rng, reason="smallest prefill + decode blocks")
        low, high = min(costs), max(costs)
        if self.temperature == 0 or low == high:
            return decision
        weights = [exp((low - cost) / (high - low) / self.temperature) for cost in costs]
        chosen = self.rng.choices(candidates, weights)[0]
        return Decision(chosen.worker.id, chosen.cached, None, costs, "softmax of the costs")


class LMetric(RoutingPolicy):
    name = "lmetric"
    description = "New prefill tokens (queued ones included) times batch size; the smallest product wins."
    source = "LMetric, arXiv 2603.15202; vllm-router 0.1.17 kv_aware"

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        scores = [
            (worker.pending_prefill + query.length - candidate.cached) * (worker.in_flight + 1)
            for candidate in candidates
            for worker in (candidate.worker,)
        ]
        return smallest(scores, candidates, self.rng, reason="smallest prefill x batch")
