"""The host of a routing policy: prefix index, shared bookkeeping, one ticket per request.

Pure like the policies: the simulator, the gateway, the Envoy picker and Ray Serve hand in the time. Every
ticket is completed exactly once, and then everything it added is taken off again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from kvist.model import Query, WorkerState
from kvist.prefix.base import PrefixKnowledge
from kvist.prefix.index import PrefixIndex
from kvist.routing.base import Candidate, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.shortlist import shortlist


class NoWorker(Exception):
    """No worker can take the query: none is there, or all that are allowed are draining."""


class Router:
    def __init__(self, policy: RoutingPolicy, *, index: PrefixKnowledge | None = None) -> None:
        self.policy = policy
        self.index: PrefixKnowledge = index if index is not None else PrefixIndex()
        self._workers: dict[str, Candidate] = {}
        self._open: list[Candidate] = []  # those not draining, in order of joining
        self._free_slots: list[int] = []
        self._slots = 0

    @property
    def workers(self) -> Iterable[WorkerState]:
        return [candidate.worker for candidate in self._workers.values()]

    def worker(self, worker_id: str) -> WorkerState:
        """Raises KeyError for an unknown worker."""
        return self._workers[worker_id].worker

    def add_worker(self, worker_id: str, now: float = 0.0, *, capacity: int = 0) -> WorkerState:
        """A worker joins; `capacity` in tokens, 0 if unknown. Raises ValueError for a known id."""
        if worker_id in self._workers:
            raise ValueError(f"worker {worker_id!r} is there already")
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._slots
            self._slots += 1
        worker = WorkerState(worker_id, slot=slot, capacity=capacity)
        self.index.add_worker(slot, capacity)
        self._workers[worker_id] = Candidate(worker, 0)
        self._refresh()
        self.policy.worker_added(worker, now)
        return worker

    def set_capacity(self, worker_id: str, capacity: int) -> None:
        """A worker's cache capacity in tokens became known. Raises KeyError for an unknown worker."""
        worker = self.worker(worker_id)
        worker.capacity = capacity
        self.index.set_capacity(worker.slot, capacity)

    def remove_worker(self, worker_id: str, now: float = 0.0) -> None:
        """A worker leaves; tickets in flight on it stay valid and are completed by the host."""
        worker = self._workers.pop(worker_id).worker
        self.index.remove_worker(worker.slot)
        self._free_slots.append(worker.slot)
        worker.slot = -1
        self._refresh()
        self.policy.worker_removed(worker, now)

    def drain(self, worker_id: str, draining: bool = True) -> None:
        """Send nothing new to a worker (or do again)."""
        self._workers[worker_id].worker.draining = draining
        self._refresh()

    def set_policy(self, policy: RoutingPolicy, now: float) -> None:
        """Switch policies at run time; tickets in flight are the old policy's until they end."""
        self.policy = policy
        for worker in self.workers:
            policy.worker_added(worker, now)

    def route(self, query: Query, now: float, allowed: Collection[str] | None = None) -> Ticket:
        """Choose a worker among `allowed` (default all). Raises NoWorker."""
        candidates = self._open
        if allowed is not None:
            candidates = [c for c in candidates if c.worker.id in allowed]
        if not candidates:
            raise NoWorker("no worker to route to")
        policy = self.policy
        if policy.needs_index:
            cached = self.index.match(query, self._slots, now)
            if 0 < policy.shortlist < len(candidates):
                candidates = shortlist(candidates, cached, policy.shortlist, policy.rng)
            length = query.length
            for candidate in candidates:
                held = cached[candidate.worker.slot]
                candidate.cached = held if held < length else length
        else:
            for candidate in candidates:
                candidate.cached = 0
        decision = policy.choose(query, candidates, now)
        worker = self._workers[decision.worker].worker
        ticket = Ticket(query, worker, decision, now, policy, candidates)
        worker.in_flight += 1
        worker.waiting += 1
        worker.routed += 1
        worker.in_flight_tokens += query.length
        worker.pending_prefill += query.length - decision.cached
        policy.dispatched(ticket, now)
        if policy.needs_index:
            self.index.routed(query, worker.slot, now)
            worker.cached_tokens = self.index.cached_tokens(worker.slot)
        return ticket

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The first token arrived. Further calls do nothing."""
        if ticket.first_token_at is not None or ticket.done:
            return
        ticket.first_token_at = now
        ticket.worker.waiting -= 1
        ticket.worker.pending_prefill -= ticket.query.length - ticket.decision.cached
        ticket.policy.first_token(ticket, now)

    def complete(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """The request ended, one way or another. Further calls do nothing."""
        if ticket.done:
            return
        worker, query = ticket.worker, ticket.query
        ticket.done = True
        if ticket.first_token_at is None:
            worker.waiting -= 1
            worker.pending_prefill -= query.length - ticket.decision.cached
        elif outcome.ttft is None:
            outcome.ttft = ticket.first_token_at - ticket.routed_at
        if outcome.latency is None:
            outcome.latency = now - ticket.routed_at
        worker.in_flight -= 1
        worker.in_flight_tokens -= query.length
        ticket.policy.completed(ticket, outcome, now)
        if worker.slot < 0 or not ticket.policy.needs_index:
            return
        if outcome.status is Status.OK:
            cached = outcome.cached_tokens
            output = 0 if cached is None else outcome.output_tokens  # else it is an estimate
            self.index.answered(query, worker.slot, ticket.decision.cached, cached, output, now)
        elif ticket.first_token_at is None:
            self.index.dropped(query, worker.slot, now)
        else:
            self.index.answered(query, worker.slot, 0, None, 0, now)

    def _refresh(self) -> None:
        self._open = [c for c in self._workers.values() if not c.worker.draining]
