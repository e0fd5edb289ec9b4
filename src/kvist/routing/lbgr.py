"""LBGR, learning-based greedy routing (paper section 3).

For every worker the end-to-end latency of this query is predicted, and the smallest prediction wins:

    intercept + a_cached * cached + a_miss * uncached + w * load

All four coefficients are learned online, per worker, by recursive least squares with forgetting. `load` is
the worker's queue in seconds of service: on routing, the query's estimated service time is added; it decays
exponentially; on completion, failure or cancellation what is left of it is given back. The decay's half-life
is the worker's own usual latency, so that a reservation fades over about the life of the request behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from random import Random

from kvist.model import Query, WorkerState
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.rls import RecursiveLeastSquares

# Seconds, seconds per 1000 cached and uncached tokens, seconds per second of load: an H100-class worker with
# an 8B model is about 0.02 s per 1000 tokens, an L40 0.14 s; the first answers settle which it is.
PRIOR = (0.02, 0.002, 0.08, 1.0)
SPREAD = (0.3, 0.1, 1.0, 1.0)
BOUNDS = ((0.0, inf), (0.0, inf), (1e-6, inf), (0.1, 10.0))
SHORTEST_HALF_LIFE = 0.1  # seconds


class _Worker:
    """What LBGR knows of one worker."""

    __slots__ = ("at", "clock", "latency", "load", "model", "state")

    def __init__(self, model: RecursiveLeastSquares, now: float, state: WorkerState) -> None:
        self.model = model
        self.state = state
        self.load = 0.0  # seconds of service, as of `at`
        self.at = now
        self.clock = 0.0  # half-lives passed
        self.latency = 1.0  # usual latency, seconds

    def decay(self, now: float) -> None:
        if now > self.at:
            halves = (now - self.at) / max(self.latency, SHORTEST_HALF_LIFE)
            self.clock += halves
            self.load *= 0.5**halves
            self.at = now
            self.state.load = self.load


class LBGR(RoutingPolicy):
    name = "lbgr"
    description = "Learns each worker's latency online (cached, uncached, queue) and takes the smallest."
    source = "paper section 3 (arXiv 2601.18999)"
    params = {
        "objective": "what is predicted: `latency` (end to end) or `ttft`",
        "forgetting": "weight of the past per observation (0.99)",
    }

    def __init__(
        self,
        *,
        objective: str = "latency",
        forgetting: float = 0.99,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if objective not in ("latency", "ttft"):
            raise ValueError(f"objective must be latency or ttft, not {objective!r}")
        self.objective = objective
        self.forgetting = forgetting
        self._model()  # a wrong `forgetting` shows now
        self._workers: dict[str, _Worker] = {}
        self._restored: dict[str, dict[str, object]] = {}

    def _model(self) -> RecursiveLeastSquares:
        return RecursiveLeastSquares(PRIOR, SPREAD, BOUNDS, self.forgetting)

    def worker_added(self, worker: WorkerState, now: float) -> None:
        """A new worker starts from what it knew before a restart, else from its fellows' mean."""
        model = self._model()
        known = [own.model for own in self._workers.values() if own.model.observations]
        if worker.id in self._restored:
            model.load(self._restored.pop(worker.id))
        elif known:
            columns = zip(*(other.theta for other in known), strict=True)
            model.theta = [sum(column) / len(known) for column in columns]
        self._workers[worker.id] = _Worker(model, now, worker)

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        self._workers.pop(worker.id, None)

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        length = query.length
        best, chosen, ties = inf, candidates[0], 0
        scores = []
        for candidate in candidates:
            own = self._workers[candidate.worker.id]
            if now > own.at:
                own.decay(now)
            base, per_cached, per_miss, per_load = own.model.theta
            cached = candidate.cached
            score = base + (per_cached * cached + per_miss * (length - cached)) / 1000 + per_load * own.load
            scores.append(score)
            if score < best:
                best, chosen, ties = score, candidate, 1
            elif score == best:  # cold start: equals share the load
                ties += 1
                if self.rng.random() * ties < 1:
                    chosen = candidate
        return Decision(chosen.worker.id, chosen.cached, best, scores, "smallest predicted " + self.objective)

    def dispatched(self, ticket: Ticket, now: float) -> None:
        own = self._workers[ticket.worker.id]
        own.decay(now)
        cached = ticket.decision.cached / 1000
        miss = ticket.query.length / 1000 - cached
        base, per_cached, per_miss, _ = own.model.theta
        service = base + per_cached * cached + per_miss * miss
        ticket.memo = (cached, miss, own.load, service, own.clock)
        own.load += service
        own.state.load = own.load

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        own = self._workers.get(ticket.worker.id)
        if own is None or own.state is not ticket.worker or not ticket.memo:
            return
        cached, miss, load, service, clock = ticket.memo
        own.decay(now)
        own.load = max(own.load - service * 0.5 ** (own.clock - clock), 0.0)
        if not ticket.worker.in_flight:
            own.load = 0.0  # no rounding is left behind
        own.state.load = own.load
        seen = outcome.ttft if self.objective == "ttft" and outcome.ttft is not None else outcome.latency
        if outcome.status is not Status.OK or seen is None or not isfinite(seen) or seen < 0:
            return
        own.model.update((1.0, cached, miss, load), seen)
        own.latency += 0.05 * (min(seen, 10 * own.latency) - own.latency)

    def snapshot(self) -> dict[str, object]:
        return {worker_id: own.model.dump() for worker_id, own in self._workers.items()}

    def restore(self, state: dict[str, object]) -> None:
        """Applies to workers that are there and to those that join later."""
        for worker_id, dump in state.items():
            if not isinstance(dump, dict):
                raise ValueError(f"{worker_id}: an object with theta, covariance, … expected")
            try:
                self._model().load(dump)
            except ValueError as error:
                raise ValueError(f"{worker_id}.{error}") from None
            if worker_id in self._workers:
                self._workers[worker_id].model.load(dump)
            else:
                self._restored[worker_id] = dump
