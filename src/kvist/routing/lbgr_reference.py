"""LBGR with the constants of the authors' research code, for comparison (paper section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.model import TOKEN_BYTES, Query, WorkerState
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket

MS_PER_1000_UNCACHED = 1000.0  # per 1000 characters; cached characters and the intercept cost nothing
DECAY = 31 / 32  # of the load, every …
DECAY_PERIOD = 0.020  # seconds
FORGETTING = 0.95
P0 = 1e6
FLOOR_MS = 1.0  # of the service estimate, of the residual target, and of a lead that counts
CHARACTERS_PER_TOKEN = 4


class _Worker:
    __slots__ = ("at", "bias", "load", "p", "state")

    def __init__(self, now: float, state: WorkerState) -> None:
        self.state = state
        self.load = 0.0  # ms
        self.at = now
        self.bias = 0.0  # ms, the only coefficient that is learned
        self.p = P0


class LBGRReference(RoutingPolicy):
    name = "lbgr_reference"
    description = "LBGR with the fixed constants of the authors' code: only a bias per worker is learned."
    source = "fzwark/KVRouting router, constants as in paper section 3"

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._workers: dict[str, _Worker] = {}

    def worker_added(self, worker: WorkerState, now: float) -> None:
        own = self._workers.get(worker.id)
        if own is None or own.state is not worker:
            self._workers[worker.id] = _Worker(now, worker)

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        self._workers.pop(worker.id, None)

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        scores = []
        best = 0
        for i, candidate in enumerate(candidates):
            own = self._decayed(candidate.worker.id, now)
            scores.append(_service(query, candidate.cached) + own.load + own.bias)
            if scores[i] < scores[best] - FLOOR_MS:
                best = i
        chosen = candidates[best]
        seconds = [score / 1000 for score in scores]
        return Decision(chosen.worker.id, chosen.cached, seconds[best], seconds, "smallest predicted latency")

    def dispatched(self, ticket: Ticket, now: float) -> None:
        own = self._decayed(ticket.worker.id, now)
        service = _service(ticket.query, ticket.decision.cached)
        ticket.memo = (service, service + own.load)
        own.load += service

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        known = self._workers.get(ticket.worker.id)
        if known is None or known.state is not ticket.worker or not ticket.memo:
            return
        own = self._decayed(ticket.worker.id, now)
        service, predicted = ticket.memo
        left = service * DECAY ** ((now - ticket.routed_at) / DECAY_PERIOD)
        own.load = max(own.load - left, 0.0)
        if outcome.status is Status.OK and outcome.latency is not None:
            target = max(outcome.latency * 1000 - predicted, FLOOR_MS)
            gain = own.p / (FORGETTING + own.p)
            own.bias += gain * (target - own.bias)
            own.p = (own.p - gain * own.p) / FORGETTING

    def _decayed(self, worker_id: str, now: float) -> _Worker:
        own = self._workers[worker_id]
        if now > own.at:
            own.load *= DECAY ** ((now - own.at) / DECAY_PERIOD)
            own.at = now
        return own


def _service(query: Query, cached: int) -> float:
    """Estimated service time in ms, from lengths in characters."""
    characters = CHARACTERS_PER_TOKEN if query.unit == TOKEN_BYTES else 1
    uncached = (query.length - cached) * characters
    return max(MS_PER_1000_UNCACHED * uncached / 1000, FLOOR_MS)
