"""llm-d's latency predictor as a routing policy, for comparison in the simulator only.

Gradient-boosted trees predict the time to first token from a worker's figures: KV use, prompt length,
requests waiting and running, the share of the prompt that is cached. One model serves all workers. It learns
in batches: from time to time it is trained anew on the latest answers. The worker with the smallest
prediction wins; before the first training, the fewest in flight.

llm-d reads the figures from metrics every 50 ms; here the router's own, which are fresher, stand for them.
Needs the extra: pip install 'kvist[xgboost]'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from kvist.model import Query
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.choice import smallest


class LLMD(RoutingPolicy):
    name = "llm-d"
    description = "Gradient-boosted trees predict the time to first token; smallest wins (simulator only)."
    source = "llm-d / gateway-api-inference-extension latencypredictor (training_server.py, XGBoost)"
    params = {
        "every": "answers between trainings (100)",
        "keep": "answers that are trained on (2000)",
        "trees": "trees of a model (100)",
    }

    def __init__(
        self, *, every: int = 100, keep: int = 2000, trees: int = 100, rng: Random | None = None
    ) -> None:
        super().__init__(rng=rng)
        try:
            import xgboost
        except ImportError:
            raise ValueError("llm-d needs XGBoost: pip install 'kvist[xgboost]'") from None
        self._xgboost: Any = xgboost
        self.every, self.trees = every, trees
        self._rows: deque[tuple[float, ...]] = deque(maxlen=keep)
        self._seen: deque[float] = deque(maxlen=keep)
        self._new = 0
        self._model: Any = None

    @staticmethod
    def _row(query: Query, candidate: Candidate) -> tuple[float, ...]:
        worker = candidate.worker
        use = min(worker.in_flight_tokens / worker.capacity, 1.0) if worker.capacity else 0.0
        share = candidate.cached / query.length if query.length else 0.0
        running = worker.in_flight - worker.waiting
        return use, float(query.length), float(worker.waiting), float(running), share

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        rows = [self._row(query, candidate) for candidate in candidates]
        if self._model is None:
            loads = [candidate.worker.in_flight for candidate in candidates]
            decision = smallest(loads, candidates, self.rng, reason="untrained: fewest in flight")
        else:
            told = self._model.inplace_predict(np.array(rows, dtype=np.float32)).tolist()
            decision = smallest(told, candidates, self.rng, reason="smallest predicted time to first token")
        chosen = next(i for i, c in enumerate(candidates) if c.worker.id == decision.worker)
        decision.memo = rows[chosen]
        return decision

    def first_token(self, ticket: Ticket, now: float) -> None:
        self._learn(ticket, now - ticket.routed_at)

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        if ticket.first_token_at is None and outcome.status is Status.OK and outcome.ttft is not None:
            self._learn(ticket, outcome.ttft)

    def _learn(self, ticket: Ticket, seen: float) -> None:
        self._rows.append(ticket.decision.memo)
        self._seen.append(seen)
        self._new += 1
        if self._new < self.every:
            return
        self._new = 0
        data = self._xgboost.DMatrix(np.array(self._rows, np.float32), np.array(self._seen, np.float32))
        settings = {"max_depth": 6, "eta": 0.1, "nthread": 1, "verbosity": 0, "seed": 0}
        self._model = self._xgboost.train(settings, data, self.trees)
