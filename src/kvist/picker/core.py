"""Which endpoints serve a request: admission, routing and learning, apart from any wire format.

Pure like the router below it: the time is handed in, and whoever carries the messages calls in the order
of a request's life: `ask`, then (`answered`, `first_data`)?, then `end`, exactly once for each flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from heapq import nsmallest

from kvist.gateway.admission import Admission
from kvist.gateway.metrics import Metrics
from kvist.gateway.prompt import BadBody, parse, to_query
from kvist.gateway.settings import ROUTED
from kvist.gateway.usage import read_usage
from kvist.picker.flight import Asked, Endpoints, Flight, Prepare, Refused
from kvist.picker.protocol import in_subset, place_of, url_of
from kvist.picker.settings import PickerSettings
from kvist.routing import NoWorker, Outcome, Status, Ticket


class Picker:
    def __init__(
        self,
        settings: PickerSettings,
        endpoints: Endpoints,
        clock: Callable[[], float],
        log: Callable[..., None] = lambda event, **fields: None,
        prepare: Prepare | None = None,
    ) -> None:
        """`clock` is read only when a request had to wait, for its turn or its tokens."""
        self.settings = settings
        self.endpoints = endpoints
        self.clock = clock
        self.prepare = prepare
        self.log = log
        self.metrics = Metrics()
        self.admission = Admission(0, settings.queue_size, settings.queue_timeout)
        self.objectives = dict(settings.objectives)
        self._kinds = dict(ROUTED) | dict.fromkeys(settings.allow_paths, "any")
        self._numbers = itertools.count()

    # A request comes
    def ask(self, asked: Asked, now: float) -> Flight:
        """Place a request, or let it wait (`Flight.waiting`). Raises Refused."""
        flight = Flight(asked)
        try:
            self._read(flight)
            self._admit(flight, now)
            if flight.entry is None:
                self._begin(flight, now)
        except Refused as refusal:
            self.metrics.refused[str(refusal.status)] += 1
            raise
        return flight

    def _read(self, flight: Flight) -> None:
        """The query, for paths whose body is a prompt; others are passed on without one."""
        asked = flight.asked
        kind = self._kinds.get(asked.path)
        if kind is None or asked.method != "POST":
            return
        try:
            body = parse(asked.body)
            query = to_query(next(self._numbers), kind, body, asked.fairness)
        except BadBody as error:
            raise Refused(400, str(error)) from None
        if query.model and not self.endpoints.serves(query.model):
            raise Refused(404, f"The model `{query.model}` does not exist.")
        query.priority = self.objectives.get(asked.objective, 0)
        flight.query, flight.kind, flight.body = query, kind, body
        flight.stream = bool(body.stream)

    def _admit(self, flight: Flight, now: float) -> None:
        query = flight.query
        if query is None:
            return
        if not self._choices(flight, now):
            raise Refused(503, "no endpoint is ready for this request", retry_after=1)
        self._bound(now)
        shed = query.priority < 0 and self.endpoints.saturated(query.model, now)
        if not shed and self.admission.enter():
            return
        if query.priority < 0:
            raise Refused(429, "the pool is saturated and this request may be shed", retry_after=1)
        flight.entry = self.admission.wait(
            query.priority,
            flight.asked.fairness,
            now,
            lambda: self._turn(flight),
            lambda: self._expired(flight),
        )
        if flight.entry is None:
            raise Refused(429, "too many requests are waiting: try again later", retry_after=1)

    def _bound(self, now: float) -> None:
        """The pool holds so many requests for each ready endpoint."""
        if self.settings.max_in_flight:
            self.admission.most = self.settings.max_in_flight * max(len(self.endpoints.allowed("", now)), 1)

    def _choices(self, flight: Flight, now: float) -> Collection[str]:
        query, wanted = flight.query, flight.asked.subset
        allowed = self.endpoints.allowed(query.model if query is not None else "", now)
        return allowed if wanted is None else [url for url in allowed if in_subset(place_of(url), wanted)]

    def _begin(self, flight: Flight, now: float) -> None:
        """It has a place (or needs none)."""
        query, body = flight.query, flight.body
        if self.prepare is not None and query is not None and body is not None:
            flight.preparing = True
            self.prepare(
                query, flight.kind, body, flight.asked.body, lambda done: self._prepared(flight, done)
            )
            if flight.preparing:
                flight.late = True
                return
        self._place(flight, now)

    def _prepared(self, flight: Flight, tokenised: bool) -> None:
        flight.preparing = False
        flight.tokenised = tokenised
        if flight.late and not flight.gone:
            self._later(flight, self._place)

    def _place(self, flight: Flight, now: float) -> None:
        flight.body = None  # it holds on to all of the request's bytes
        allowed = self._choices(flight, now)
        router = self.endpoints.router
        if flight.query is None:  # nothing to weigh: the endpoint with the least to do
            ready = [worker for worker in router.workers if worker.id in allowed]
            ready.sort(key=lambda worker: (worker.in_flight, worker.routed))
            flight.places = tuple(place_of(worker.id) for worker in ready[: 1 + self.settings.fallbacks])
            if not flight.places:
                raise Refused(503, "no endpoint is ready for this request", retry_after=1)
            return
        try:
            ticket = router.route(flight.query, now, allowed)
        except NoWorker:
            self.admission.leave()
            raise Refused(503, "no endpoint is ready for this request", retry_after=1) from None
        flight.ticket = ticket
        flight.places = self._order(ticket, allowed)
        self.endpoints.sent(ticket.worker.id, now)
        self.metrics.decisions[ticket.policy.name, ticket.worker.id] += 1

    def _order(self, ticket: Ticket, allowed: Collection[str]) -> tuple[str, ...]:
        """The decision first, then the runners-up by score, or by requests in flight where there is none."""
        first, spare = ticket.worker.id, self.settings.fallbacks
        if not spare or len(allowed) == 1:
            return (place_of(first),)
        open_ = [w for w in self.endpoints.router.workers if not w.draining and w.id in allowed]
        scores = ticket.decision.scores
        if len(scores) != len(open_):
            scores = [float(worker.in_flight) for worker in open_]
        ranked = nsmallest(spare + 1, zip(scores, (worker.id for worker in open_), strict=True))
        others = [url for _, url in ranked if url != first]
        return tuple(place_of(url) for url in (first, *others[:spare]))

    # A request waited
    def _turn(self, flight: Flight) -> None:
        flight.entry = None
        self._later(flight, self._begin)

    def _later(self, flight: Flight, go_on: Callable[[Flight, float], None]) -> None:
        try:
            go_on(flight, self.clock())
        except Refused as refusal:
            self._refuse(flight, refusal)
        if not flight.waiting:
            flight.settle()

    def _expired(self, flight: Flight) -> None:
        flight.entry = None
        self._refuse(flight, Refused(429, "the pool stayed saturated: try again later", retry_after=2))
        flight.settle()

    def _refuse(self, flight: Flight, refusal: Refused) -> None:
        flight.refused = refusal
        self.metrics.refused[str(refusal.status)] += 1

    # The answer
    def answered(self, flight: Flight, status: int, served: str, now: float) -> None:
        """The head of the answer came from `served` ("" if the data plane does not say).

        If that is not the endpoint that was chosen, the chosen one failed: the request counts where it is.
        """
        flight.status = status
        ticket = flight.ticket
        if ticket is None or not served or flight.query is None or flight.gone:
            return
        chosen, served = ticket.worker.id, url_of(served)
        if served == chosen:
            return
        self.log("fallback", endpoint=chosen, served=served)
        self.endpoints.failed(chosen, now)
        own = self.metrics.worker(chosen)
        own.outcomes[Status.FAILED] += 1
        own.retries += 1
        router = self.endpoints.router
        router.complete(ticket, Outcome(Status.FAILED), now)
        flight.ticket = None
        try:
            flight.ticket = router.route(flight.query, now, {served})
        except NoWorker:  # not one of ours (any more): nothing to learn
            return
        self.endpoints.sent(served, now)

    def first_data(self, flight: Flight, now: float) -> None:
        """The first bytes of the answer's body came."""
        if flight.ticket is not None and flight.stream and flight.status < 400:
            self.endpoints.router.first_token(flight.ticket, now)

    def end(self, flight: Flight, status: Status, tail: bytes, now: float) -> None:
        """The request ended, one way or another; `tail` is the end of the answer, where `usage` stands."""
        flight.gone = True
        if flight.entry is not None:
            self.admission.cancel(flight.entry)
            flight.entry = None
            self.metrics.disconnects += 1
            return
        if flight.query is None or flight.refused is not None:
            return
        if status is Status.OK and flight.status >= 400:
            status = Status.FAILED
        self._complete(flight, status, tail, now)
        self._bound(now)
        self.admission.leave()

    def _complete(self, flight: Flight, status: Status, tail: bytes, now: float) -> None:
        ticket = flight.ticket
        if ticket is None:
            return
        url = ticket.worker.id
        outcome = Outcome(status, latency=now - ticket.routed_at)
        own = self.metrics.worker(url)
        own.outcomes[status] += 1
        if status is Status.CANCELLED:
            self.metrics.disconnects += 1
            self.endpoints.released(url)
        elif flight.status >= 500:
            self.endpoints.failed(url, now)
        else:
            self.endpoints.succeeded(url)
        if status is Status.OK:
            self._usage(flight, ticket, outcome, tail)
            own.latency.observe(now - ticket.routed_at)
            if ticket.first_token_at is not None:
                own.ttft.observe(ticket.first_token_at - ticket.routed_at)
            if ticket.decision.predicted is not None:
                own.error.observe(abs(now - ticket.routed_at - ticket.decision.predicted))
        self.endpoints.router.complete(ticket, outcome, now)

    def _usage(self, flight: Flight, ticket: Ticket, outcome: Outcome, tail: bytes) -> None:
        """True token counts from the end of the answer, scaled to the index's units."""
        prompt, outcome.output_tokens, cached = read_usage(tail, flight.events)
        if cached is None or not prompt:
            return
        scale = ticket.query.length / prompt
        if flight.tokenised:
            self.metrics.token_counts[ticket.query.length == prompt] += 1
        outcome.cached_tokens = round(cached * scale)
        own = self.metrics.worker(ticket.worker.id)
        own.cached_true += cached
        own.prompt_true += prompt
        own.cached_estimated += ticket.decision.cached / scale

    def sweep(self, now: float) -> None:
        """Called a few times a second: requests that waited too long, endpoints that came."""
        self._bound(now)
        self.admission.admit()
        self.admission.sweep(now)
