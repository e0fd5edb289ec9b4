"""The discrete-event cluster: queries arrive, the router sends them to workers, workers compute steps.

Three kinds of moments, in this order where they coincide: workers join or leave, a query arrives, a worker
ends a step. The router hears of first tokens and ends when they happen, and of the caches only what its index
makes of its own decisions, or with kv_events what the caches announce.

A worker that fails takes its step under way with it; its requests are routed again (they keep their time of
arrival) or fail, as configured. A query that finds no worker waits for one to join, and fails if none will.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from math import inf
from random import Random

from kvist.cache.events import CacheEvent, Removed, Stored
from kvist.engine.request import Refused, Request
from kvist.model import Query
from kvist.prefix.base import PrefixKnowledge
from kvist.prefix.events import EventIndex
from kvist.prefix.index import PrefixIndex
from kvist.routing import make_policy
from kvist.routing.base import Outcome, RoutingPolicy, Status
from kvist.routing.router import NoWorker, Router
from kvist.sim.base import SimConfig, SimResult, WorkerSpec
from kvist.sim.clairvoyant import Clairvoyant
from kvist.sim.llmd import LLMD
from kvist.sim.record import Recorder
from kvist.sim.worker import Flight, Worker

SIMULATOR_ONLY: dict[str, type[RoutingPolicy]] = {policy.name: policy for policy in (Clairvoyant, LLMD)}


def simulate(
    queries: Iterable[Query], config: SimConfig, *, policy: RoutingPolicy | None = None
) -> SimResult:
    """Run `queries`, in order of arrival, through the cluster of `config`; identical for identical seeds.

    policy: a routing policy object instead of the named one. Raises ValueError for unknown names, bad values
    and queries out of order.
    """
    return Cluster(config, policy=policy).run(queries)


class Cluster:
    """One run. `workers` (by id) and `router` are there to look at for a policy that knows all."""

    def __init__(self, config: SimConfig, *, policy: RoutingPolicy | None = None) -> None:
        self.config = config
        if policy is None:
            policy = self._policy(config)
        self._events = EventIndex(unit=config.unit) if config.kv_events else None
        index: PrefixKnowledge = self._events or PrefixIndex(unit=config.unit, block_size=config.block_size)
        self.router = Router(policy, index=index)
        self.workers: dict[str, Worker] = {}
        self._everyone: list[Worker] = []  # also those that left
        self._homeless: deque[Flight] = deque()
        self.agenda: list[tuple[float, int, Worker]] = []
        self._ticks = 0
        self._changes = _changes(config.specs())
        self._next: Query | None = None
        self._last = -inf

    def _policy(self, config: SimConfig) -> RoutingPolicy:
        rng = Random(f"{config.seed}/router")
        if config.router not in SIMULATOR_ONLY:
            return make_policy(config.router, rng=rng, **config.router_params)
        try:
            policy = SIMULATOR_ONLY[config.router](rng=rng, **config.router_params)
        except TypeError as error:
            raise ValueError(f"routing policy {config.router}: {error}") from None
        if isinstance(policy, Clairvoyant):
            policy.cluster = self
        return policy

    def run(self, queries: Iterable[Query]) -> SimResult:
        arrivals = iter(queries)
        agenda, changes = self.agenda, self._changes
        self._advance(arrivals)
        start = self._next.arrival if self._next is not None else 0.0
        self.record = Recorder(self.config, start)
        while True:
            arrival = self._next.arrival if self._next is not None else inf
            step = agenda[0][0] if agenda else inf
            if changes and changes[0][0] <= min(arrival, step):
                if arrival == step == inf and not self._homeless:
                    break
                now, change, spec = changes.popleft()
                if change == "join":
                    self._join(spec, now)
                elif change == "leave":
                    self._leave(spec, now)
                elif spec.id in self.workers:
                    self.workers[spec.id].set_pace(dict(spec.paces)[now])
            elif arrival <= step:
                if self._next is None:
                    break
                flight = Flight(self._next, self.record.arrived(arrival, self._everyone))
                self._advance(arrivals)
                self._dispatch(flight, arrival)
            else:
                now, _, worker = heappop(agenda)
                if worker.alive:
                    self._step(worker, now)
        for flight in self._homeless:
            self.record.failed(flight)
        return self.record.result(self._everyone)

    def _advance(self, arrivals: Iterator[Query]) -> None:
        self._next = query = next(arrivals, None)
        if query is None:
            return
        if query.arrival < self._last:
            raise ValueError(
                f"query {query.id!r} arrives at {query.arrival} s, after one at {self._last} s: "
                "sort the queries by arrival"
            )
        self._last = query.arrival

    def _dispatch(self, flight: Flight, now: float) -> None:
        query = flight.query
        try:
            ticket = self.router.route(query, now)
        except NoWorker:
            self._homeless.append(flight)
            return
        flight.ticket = ticket
        worker = self.workers[ticket.decision.worker]
        try:
            request = worker.engine.submit(query, now)
        except Refused:
            self.router.complete(ticket, Outcome(Status.FAILED), now)
            self.record.refused(flight)
            return
        request.tag = flight
        self.record.load(worker, now, 1)
        if not worker.stepping:  # start when everything that happens at this moment has happened
            self._plan(worker, now)

    def _plan(self, worker: Worker, time: float) -> None:
        worker.stepping = True
        self._ticks += 1
        heappush(self.agenda, (time, self._ticks, worker))

    def _step(self, worker: Worker, now: float) -> None:
        """End the step under way, if any, and begin the next."""
        engine = worker.engine
        if engine.stepping:
            result = engine.end_step(now)
            for request in result.first:
                self.router.first_token(request.tag.ticket, now)
            for request in result.finished:
                self._complete(worker, request, now)
        until = self._next.arrival if self._next is not None else inf
        if self._changes:
            until = min(until, self._changes[0][0])
        end = engine.begin_steps(now, until)
        if end is not None:
            self._plan(worker, end)
            return
        worker.stepping = False
        if worker.spec.id not in self.workers:  # it was draining and is done
            worker.alive = False

    def _complete(self, worker: Worker, request: Request, now: float) -> None:
        flight: Flight = request.tag
        assert flight.ticket is not None
        outcome = Outcome(cached_tokens=request.cached, output_tokens=request.query.output_tokens)
        self.router.complete(flight.ticket, outcome, now)
        self.record.load(worker, now, -1)
        self.record.completed(worker, flight, request, now)

    def _join(self, spec: WorkerSpec, now: float) -> None:
        on_event = None
        if self._events is not None:
            on_event = _Announcer(self._events)
        worker = Worker(spec, self.config, on_event)
        state = self.router.add_worker(spec.id, now, capacity=worker.engine.cache.capacity)
        if on_event is not None:
            on_event.slot = state.slot
        self.workers[spec.id] = worker
        self._everyone.append(worker)
        homeless, self._homeless = self._homeless, deque()
        for flight in homeless:
            self._dispatch(flight, now)

    def _leave(self, spec: WorkerSpec, now: float) -> None:
        worker = self.workers.pop(spec.id)
        self.router.remove_worker(spec.id, now)
        if isinstance(worker.on_event, _Announcer):
            worker.on_event.slot = -1  # whoever gets the slot next is not this worker
        if spec.drains:
            worker.alive = worker.stepping
            return
        worker.alive = False
        engine = worker.engine
        lost = [*engine.running, *engine.waiting]
        for request in lost:
            engine.abort(request)
            self.record.load(worker, now, -1)
            self.router.complete(request.tag.ticket, Outcome(Status.FAILED), now)
        for request in lost:
            if self.config.on_failure == "reroute":
                self.record.rerouted(request.tag)
                self._dispatch(request.tag, now)
            else:
                self.record.failed(request.tag)


class _Announcer:
    """Hands one cache's events to the router's index, under the worker's slot."""

    def __init__(self, index: EventIndex) -> None:
        self.index = index
        self.slot = -1

    def __call__(self, event: CacheEvent) -> None:
        if self.slot < 0:
            return
        if isinstance(event, Stored):
            self.index.stored(
                self.slot, event.hashes, event.parent, event.tokens, event.block_size, event.salt
            )
        elif isinstance(event, Removed):
            self.index.removed(self.slot, event.hashes)
        else:
            self.index.cleared(self.slot)


def _changes(specs: Iterable[WorkerSpec]) -> deque[tuple[float, str, WorkerSpec]]:
    """Joins, changes of pace and leaves in order of time, and in this order at the same moment."""
    found = []
    for spec in specs:
        found.append((spec.joins, "join", spec))
        found += [(moment, "pace", spec) for moment, _ in spec.paces]
        if spec.leaves is not None:
            found.append((spec.leaves, "leave", spec))
    rank = ("join", "pace", "leave").index
    return deque(sorted(found, key=lambda change: (change[0], rank(change[1]))))
