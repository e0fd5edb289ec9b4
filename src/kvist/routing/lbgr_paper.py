"""LBGR as the paper has it (section 3), to compare `kvist.routing.lbgr` with.

For every worker the end-to-end latency of this query is predicted, and the smallest prediction wins:

    intercept + a_cached * cached + a_miss * uncached + w * load

All four coefficients are learned online, per worker, by recursive least squares with forgetting. `load` is
the worker's queue: on routing, the query's service is added; it decays exponentially; on completion, failure
or cancellation what is left of it is given back. The decay's half-life is the worker's own usual latency, so
that a reservation fades over about the life of the request behind it.

Service is reserved in fixed units (thousands of uncached tokens, a cached one counting little), not in
learned seconds: if the load were measured by the coefficients that are learned from it, both could grow
without end. A worker predicts with the geometric mean of its own coefficients and the fleet's.
`congestion` > 0 adds a price: uncached tokens are charged their cost times the requests they delay, taken as
the geometric mean of the least and the mean in flight on a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from random import Random

from kvist.model import Query, WorkerState
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.rls import RecursiveLeastSquares, checked

# Seconds; seconds per 1000 cached, uncached and reserved tokens. An H100-class worker with an 8B model needs
# about 0.02 s per 1000 uncached tokens, an L40 0.14 s; the first answers settle which it is.
PRIOR = (0.02, 0.002, 0.08, 0.08)
SPREAD = (0.17, 0.07, 0.17, 0.17)
BOUNDS = ((0.0, inf), (0.0, inf), (1e-5, inf), (1e-4, inf))
RESERVED = (0.1, 0.02)  # reserved for any request, and for 1000 cached tokens, in 1000 uncached tokens
SHORTEST_HALF_LIFE = 0.1  # seconds
STALE = 50  # answers of a mean worker, after which one that was sent nothing is thought of anew


class _Worker:
    """What LBGR knows of one worker."""

    __slots__ = ("at", "clock", "latency", "learned", "load", "model", "state", "used")

    def __init__(self, model: RecursiveLeastSquares, now: float, state: WorkerState) -> None:
        self.model = model
        self.state = state
        self.load = 0.0  # reserved service as of `at`, in 1000 uncached tokens
        self.at = now
        self.clock = 0.0  # half-lives passed
        self.latency = 1.0  # usual latency, seconds
        self.learned = 0  # the fleet's count of answers when it last learned
        self.used = tuple(model.theta)  # the coefficients it predicts with

    def decay(self, now: float) -> None:
        if now > self.at:
            halves = (now - self.at) / max(self.latency, SHORTEST_HALF_LIFE)
            self.clock += halves
            self.load *= 0.5**halves
            self.at = now
            self.state.load = self.load


class LBGRPaper(RoutingPolicy):
    name = "lbgr_paper"
    description = "LBGR as published: latency from cached, uncached and a decaying load, learned online."
    source = "paper section 3 (arXiv 2601.18999)"
    params = {
        "objective": "what is predicted: `latency` (end to end) or `ttft`",
        "forgetting": "weight of the past per observation (0.99)",
        "congestion": "weight of a price for delaying others (0: as published)",
        "shortlist": "of more workers, so many are scored: longest prefixes, random others (64); 0: all",
    }

    def __init__(
        self,
        *,
        objective: str = "latency",
        forgetting: float = 0.99,
        congestion: float = 0.0,
        shortlist: int = 64,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if objective not in ("latency", "ttft"):
            raise ValueError(f"objective must be latency or ttft, not {objective!r}")
        if not 0 <= congestion < inf:
            raise ValueError(f"congestion must be at least 0, not {congestion}")
        if shortlist < 0:
            raise ValueError(f"shortlist must not be negative, not {shortlist}")
        self.shortlist = shortlist
        self.objective = objective
        self.congestion = congestion
        self.forgetting = forgetting
        self._reason = f"smallest predicted {objective}" + (" + congestion price" if congestion else "")
        self._model()  # a wrong `forgetting` shows now
        self._workers: dict[str, _Worker] = {}
        self._sum = [0.0] * len(PRIOR)  # of the workers' coefficients
        self._restored: dict[str, dict[str, object]] = {}
        self._answers = 0

    def _model(self) -> RecursiveLeastSquares:
        return RecursiveLeastSquares(PRIOR, SPREAD, BOUNDS, self.forgetting)

    def worker_added(self, worker: WorkerState, now: float) -> None:
        """A new worker starts from what it knew before a restart, else from its fellows' mean.

        One that is known already keeps its queue: tickets in flight give back what they reserved in it.
        """
        own = self._workers.get(worker.id)
        if own is not None and own.state is worker:
            if worker.id in self._restored:
                self._take_back(own)
            return
        self.worker_removed(worker, now)
        model = self._model()
        if any(own.model.observations for own in self._workers.values()):
            model.theta = [total / len(self._workers) for total in self._sum]
        own = self._workers[worker.id] = _Worker(model, now, worker)
        own.learned = self._answers
        self._sum = [total + theta for total, theta in zip(self._sum, model.theta, strict=True)]
        if worker.id in self._restored:
            self._take_back(own)

    def _take_back(self, own: _Worker) -> None:
        """What the worker's model was before a restart."""
        before = own.model.theta
        own.model = self._model()
        own.model.load(self._restored.pop(own.state.id))
        own.used = tuple(own.model.theta)
        self._sum = [t + new - old for t, new, old in zip(self._sum, own.model.theta, before, strict=True)]

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        gone = self._workers.pop(worker.id, None)
        if gone is not None:
            self._sum = [total - own for total, own in zip(self._sum, gone.model.theta, strict=True)]

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        length = query.length
        in_flight = [candidate.worker.in_flight for candidate in candidates]
        delayed = sqrt(min(in_flight) * sum(in_flight) / len(in_flight))
        price = self.congestion * delayed * self._sum[2] / len(self._workers)
        best, chosen, ties = inf, 0, 0
        scores = []
        for i, candidate in enumerate(candidates):
            own = self._workers[candidate.worker.id]
            if now > own.at:
                own.decay(now)
            base, per_cached, per_miss, per_load = own.used
            cached = candidate.cached
            miss = (length - cached) / 1000
            load = own.load + candidate.worker.load_elsewhere
            score = base + per_cached * cached / 1000 + (per_miss + price) * miss + per_load * load
            scores.append(score)
            if score < best:
                best, chosen, ties = score, i, 1
            elif score == best:  # cold start: equals share the load
                ties += 1
                if self.rng.random() * ties < 1:
                    chosen = i
        candidate = candidates[chosen]
        predicted = best - price * (length - candidate.cached) / 1000
        return Decision(candidate.worker.id, candidate.cached, predicted, scores, self._reason)

    def dispatched(self, ticket: Ticket, now: float) -> None:
        own = self._workers[ticket.worker.id]
        own.decay(now)
        cached = ticket.decision.cached / 1000
        miss = ticket.query.length / 1000 - cached
        service = RESERVED[0] + RESERVED[1] * cached + miss
        ticket.memo = (cached, miss, own.load + own.state.load_elsewhere, service, own.clock)
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
        self._learn(own, (1.0, cached, miss, load), seen)
        own.latency += 0.05 * (min(seen, 10 * own.latency) - own.latency)
        self._answers += 1
        own.learned = self._answers
        if self._answers % STALE == 0:
            self._rethink()

    def _rethink(self) -> None:
        """Workers that got nothing for long meet their fellows half way.

        A worker judged by one slow answer (it was still warming up) would never be asked again. The odd query
        that a truly slow one gets for it confirms what was known.
        """
        n = len(self._workers)
        for own in self._workers.values():
            if n == 1 or own.state.in_flight or self._answers - own.learned < STALE * n:
                continue
            before = own.model.theta
            others = [(total - theta) / (n - 1) for total, theta in zip(self._sum, before, strict=True)]
            model = self._model()  # as uncertain as at the start
            model.theta = [
                min(theta, sqrt(max(theta * other, low * low)))
                for theta, other, (low, _) in zip(before, others, model.bounds, strict=True)
            ]
            own.model, own.used = model, tuple(model.theta)
            own.learned = self._answers
            self._sum = [t + new - old for t, new, old in zip(self._sum, model.theta, before, strict=True)]

    def _learn(self, own: _Worker, features: tuple[float, ...], seen: float) -> None:
        before = own.model.theta[:]
        own.model.update(features, seen)
        n = len(self._workers)
        for i, (old, new) in enumerate(zip(before, own.model.theta, strict=True)):
            self._sum[i] += new - old
        own.used = tuple(
            sqrt(max(coefficient * total / n, 0.0))
            for coefficient, total in zip(own.model.theta, self._sum, strict=True)
        )

    def snapshot(self) -> dict[str, object]:
        return {worker_id: own.model.dump() for worker_id, own in self._workers.items()}

    def restore(self, state: dict[str, object]) -> None:
        """Applies to workers that are there and to those that join later."""
        for worker_id, dump in checked(state, self._model).items():
            self._restored[worker_id] = dump
            own = self._workers.get(worker_id)
            if own is not None:
                self.worker_added(own.state, own.at)
