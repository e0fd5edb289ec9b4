"""The gateway: what each path does, and the state that requests share."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import msgspec

from kvist.gateway import dashboard
from kvist.gateway.admission import Admission, RateLimits
from kvist.gateway.auth import Keys
from kvist.gateway.exchange import JSON, REQUEST_ID, Exchange, request_names
from kvist.gateway.fleet import Fleet
from kvist.gateway.history import History, described
from kvist.gateway.knowledge.knowledge import Knowledge
from kvist.gateway.metrics import Collector, Metrics, exposition
from kvist.gateway.prompt import BadBody, parse, to_query
from kvist.gateway.settings import ROUTED, Settings, WorkerSpec
from kvist.gateway.sharing.redis import over_redis
from kvist.gateway.tracing import Tracing
from kvist.http.server import Connection, Connections, Limits, Request, error_body
from kvist.routing import ROUTERS, Outcome, Ticket, make_policy

MODEL_PATH = "/v1/models/"  # and a model's name, which may have slashes


class Gateway:
    """Must be made inside a running event loop. `log` takes an event and its fields."""

    def __init__(
        self,
        settings: Settings,
        *,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self.settings = settings
        self.log = log
        self.now = time.monotonic  # uvloop's own clock counts whole milliseconds
        policy = make_policy(settings.policy, rng=Random(settings.seed), **settings.policy_arguments())
        self.knowledge = Knowledge(settings, lambda: self.fleet.adapters(), log)
        self.tokens = self.knowledge.tokens
        self.fleet = Fleet(
            settings, policy, self.knowledge.index, self.knowledge.subscriptions, self.knowledge.own.forget
        )
        self.keys = Keys(settings.api_keys)
        self.admin = Keys([settings.admin_key] if settings.admin_key else [])
        self.admission = Admission(
            settings.max_concurrent_requests, settings.queue_size, settings.queue_timeout
        )
        self.limits = RateLimits(settings.rate_limit, settings.rate_burst)
        self.tracing = Tracing(settings.otlp_traces_endpoint) if settings.otlp_traces_endpoint else None
        self.metrics = Metrics()
        self.collector = Collector(self.metrics, self)
        self.history = History(self)
        self.active: set[Exchange] = set()
        self.connections = Connections(
            self.handle,
            Limits(max_body=settings.max_payload_size, max_header=settings.max_header_size),
            refused=self._refused,
        )
        self._numbers = itertools.count()
        self.sharing = over_redis(settings, self.fleet.router, log)
        self._kinds = dict(ROUTED) | dict.fromkeys(settings.allow_paths, "any")
        self._pages: dict[tuple[bytes, str], Callable[[Connection], None]] = {
            (b"GET", "/health"): self._health,
            (b"GET", "/v1/models"): self._models,
            (b"GET", "/metrics"): self.respond_metrics,
            (b"GET", "/dashboard/data"): self._dashboard_data,
            (b"GET", "/workers"): self._workers,
        }

    @property
    def open_clients(self) -> int:
        return len(self.connections.open)

    # Requests
    def handle(self, request: Request, client: Connection) -> None:
        """Answer a request, now or later."""
        path = request.path
        kind = self._kinds.get(path)
        if kind is not None and request.method == b"POST":
            self._proxy(request, client, kind)
            return
        if path == "/health":
            self._health(client)
            return
        if path == "/dashboard" and request.method in (b"GET", b"HEAD"):
            self._dashboard(client)  # nothing but the page: it asks for a key where its data needs one
            return
        caller = self.keys.check(request.header(b"authorization"))
        if path == "/workers" or path.startswith(("/workers/", "/policy")):
            self._administer(request, client)
            return
        page = self._pages.get((request.method, path))
        if page is None and request.method == b"GET" and path.startswith(MODEL_PATH):
            page = partial(self._model, name=unquote(path.removeprefix(MODEL_PATH)))
        if page is None:
            known = kind is not None or path == "/dashboard" or any(path == other for _, other in self._pages)
            status, message = (405, "method not allowed") if known else (404, f"no such path: {path}")
            client.respond(status, error_body(status, message), kind=JSON)
        elif caller is None:
            self._unauthorized(client)
        else:
            page(client)

    def _proxy(self, request: Request, client: Connection, kind: str) -> None:
        caller = self.keys.check(request.header(b"authorization"))
        if caller is None:
            self._unauthorized(client)
            return
        wait = self.limits.take(caller, self.now())
        if wait:
            self.refuse(client, 429, "rate limit of this API key reached", retry_after=int(wait) + 1)
            return
        try:
            body = parse(request.body)
            query = to_query(next(self._numbers), kind, body, caller)
        except BadBody as error:
            client.respond(400, error_body(400, str(error)), kind=JSON)
            return
        if query.model and self.fleet.workers and not self.fleet.serves(query.model):
            text = f"The model `{query.model}` does not exist."
            client.respond(404, error_body(404, text, "model_not_found"), kind=JSON)
            return
        if self.settings.log_requests and request.header(REQUEST_ID) is None:
            request.headers.append((REQUEST_ID, uuid4().hex.encode()))
        exchange = Exchange(self, client, request, query, bool(body.stream))
        if self.tokens is not None:
            exchange.prepare = partial(self.tokens.prepare, query, kind, body, request.body)
        if self.admission.enter():
            exchange.begin()
            return
        exchange.entry = self.admission.wait(
            query.priority, caller, self.now(), exchange.begin, exchange.refuse_queued
        )
        if exchange.entry is None:
            client.owner = None
            self.refuse(client, 503, "too many requests are waiting: try again later", retry_after=1)

    def refuse(self, client: Connection, status: int, message: str, *, retry_after: int) -> None:
        """Turn a request away that may come back."""
        self.metrics.refused[str(status)] += 1
        client.respond(
            status,
            error_body(status, message),
            [(b"retry-after", str(retry_after).encode())],
            kind=JSON,
        )

    def _unauthorized(self, client: Connection) -> None:
        self.metrics.refused["401"] += 1
        client.respond(401, error_body(401, "a valid API key is needed", "invalid_api_key"), kind=JSON)

    def _refused(self, status: int) -> None:
        self.metrics.refused[str(status)] += 1

    def decided(self, ticket: Ticket, seconds: float) -> None:
        """A routing decision was made; it took `seconds`."""
        self.metrics.decisions[ticket.policy.name, ticket.worker.id] += 1
        self.metrics.decision_seconds += seconds

    def ended(self, exchange: Exchange, ticket: Ticket, outcome: Outcome) -> None:
        """A ticket was completed: keep it for the dashboard and the log."""
        now = self.now()
        self.history.ended(ticket, outcome, exchange.request.path, now)
        if self.settings.log_requests:
            entry = described(exchange.request.path, ticket, outcome, now)
            self.log("request", **request_names(exchange.request), **entry)
        if self.tracing is not None and exchange.span is not None:
            self.tracing.tried(exchange.span, ticket, outcome)

    def left(self, exchange: Exchange) -> None:
        """A traced request is over."""
        if self.tracing is not None:
            self.tracing.end(exchange.span, exchange.status)

    # Pages
    def _json(self, client: Connection, data: Any, status: int = 200) -> None:
        client.respond(status, msgspec.json.encode(data), kind=JSON)

    def _health(self, client: Connection) -> None:
        ready = any(worker.healthy for worker in self.fleet.workers.values())
        state = "draining" if self.connections.closing else "ok" if ready else "no healthy worker"
        self._json(client, {"status": state}, 200 if state == "ok" else 503)

    def _models(self, client: Connection) -> None:
        self._json(client, {"object": "list", "data": self.fleet.models()})

    def _model(self, client: Connection, name: str) -> None:
        found = next((model for model in self.fleet.models() if model["id"] == name), None)
        if found is None:
            text = f"The model `{name}` does not exist."
            client.respond(404, error_body(404, text, "model_not_found"), kind=JSON)
        else:
            self._json(client, found)

    def respond_metrics(self, client: Connection) -> None:
        client.respond(200, exposition(self.collector), kind=b"text/plain; version=0.0.4; charset=utf-8")

    def _dashboard(self, client: Connection) -> None:
        policy = [(b"content-security-policy", dashboard.POLICY.encode())]
        client.respond(200, dashboard.page(), policy, kind=b"text/html; charset=utf-8")

    def _dashboard_data(self, client: Connection) -> None:
        self._json(client, self.history.data())

    def _workers(self, client: Connection) -> None:
        self._json(client, {"workers": self.fleet.rows()})

    # Administration
    def _administer(self, request: Request, client: Connection) -> None:
        """GET, POST {"url": …} and DELETE /workers[/URL]; POST /policy {"policy": …, "params": {…}}."""
        keys = self.admin or self.keys
        if keys.check(request.header(b"authorization")) is None:
            self._unauthorized(client)
            return
        try:
            self._admin_action(request, client)
        except (ValueError, KeyError, TypeError, RecursionError, msgspec.DecodeError) as error:
            message = f"unknown worker {error}" if isinstance(error, KeyError) else str(error)
            client.respond(400, error_body(400, message), kind=JSON)

    def _admin_action(self, request: Request, client: Connection) -> None:
        action = (request.method, request.path.split("/")[1])
        if action == (b"GET", "workers"):
            self._workers(client)
        elif action == (b"POST", "workers"):
            spec = self._spec(request.body)
            self.fleet.add(spec, self.now())
            self._json(client, {"added": spec.url}, 201)
        elif action == (b"DELETE", "workers"):
            rest = unquote(request.path.removeprefix("/workers").lstrip("/"))
            url = rest or _text(request.body, "url")
            self.fleet.remove(url.rstrip("/"), self.now())
            self._json(client, {"removed": url})
        elif action == (b"POST", "policy"):
            name = _text(request.body, "policy")
            params = msgspec.json.decode(request.body).get("params", {})
            policy = make_policy(name, rng=Random(self.settings.seed), **params)
            self.fleet.router.set_policy(policy, self.now())
            self._json(client, {"policy": name})
        elif action == (b"GET", "policy"):
            self._json(client, {"policy": self.fleet.router.policy.name, "choices": list(ROUTERS)})
        else:
            client.respond(405, error_body(405, "method not allowed"), kind=JSON)

    def _spec(self, body: bytes) -> WorkerSpec:
        """A worker from {"url": …} and what else WorkerSpec has; the rest as for `worker_urls`."""
        given = msgspec.json.decode(body, type=dict[str, Any])
        base = msgspec.structs.asdict(self.settings.spec(_text(body, "url")))
        return msgspec.convert({**base, **given}, WorkerSpec)

    def sweep(self) -> None:
        """Called a few times a second: timeouts, idle connections, samples for the dashboard."""
        now = self.now()
        for exchange in list(self.active):
            exchange.check(now)
        self.admission.sweep(now)
        self.connections.sweep(now)
        for worker in self.fleet.workers.values():
            worker.pool.sweep(now)
        self.history.sample(now)


def _text(body: bytes, field: str) -> str:
    data = msgspec.json.decode(body)
    value = data.get(field) if isinstance(data, dict) else None
    if not isinstance(value, str) or not value:
        raise ValueError(f"the field `{field}` (text) is missing")
    return value
