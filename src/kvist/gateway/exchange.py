"""The life of one proxied request, as callbacks: admit, route, send, pass the answer on, learn.

Nothing awaits here but a new connection, so a request costs no task. Outcomes, each counted:
ok; failed (the worker broke, timed out or answered 5xx: tried again elsewhere while the client has seen
nothing, else the client's connection is cut); cancelled (the client left: the upstream request is cut and
the reservation given back).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvist.gateway.admission import Waiting
from kvist.gateway.fleet import Worker
from kvist.gateway.usage import TAIL, read_usage
from kvist.http.client import UpstreamConnection
from kvist.http.server import Connection, Request, error_body
from kvist.model import Query
from kvist.routing import NoWorker, Outcome, Status, Ticket

if TYPE_CHECKING:
    from kvist.gateway.app import Gateway

Header = tuple[bytes, bytes]

RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})
BUSY = frozenset({429, 503})  # with Retry-After: the worker is well, only full
HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer", b"upgrade"}
)
DROPPED = HOP | {b"host", b"content-length", b"transfer-encoding", b"expect", b"authorization"}
JSON = b"application/json"
REQUEST_ID = b"x-request-id"
TELLS_CACHED = frozenset({"/v1/chat/completions", "/v1/completions"})  # where usage counts cached tokens


class Exchange:
    __slots__ = (
        "_attempts",
        "_client_paused",
        "_connecting",
        "_events",
        "_last_data",
        "_tail",
        "_tried",
        "busy",
        "client",
        "deadline",
        "entry",
        "first_data",
        "gateway",
        "prepare",
        "query",
        "request",
        "span",
        "started",
        "state_deadline",
        "status",
        "stream",
        "ticket",
        "tokenised",
        "upstream",
        "worker",
    )

    def __init__(
        self, gateway: Gateway, client: Connection, request: Request, query: Query, stream: bool
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.request = request
        self.query = query
        self.stream = stream
        self.entry: Waiting | None = None  # in the queue
        self.ticket: Ticket | None = None
        self.worker: Worker | None = None
        self.upstream: UpstreamConnection | None = None
        self.started = gateway.now()
        self.deadline = self.started + gateway.settings.request_timeout
        self.state_deadline = self.deadline
        self.first_data = 0.0
        self.status = 0
        self.busy = False  # the worker refused for now
        self._attempts = 0
        self._tried: set[str] = set()
        self._tail = b""
        self._last_data = 0.0
        self._events = 0  # of a stream
        self._connecting: asyncio.Task[None] | None = None
        self._client_paused = False
        self.prepare: Callable[[Callable[[bool], None]], None] | None = None  # makes token ids of the query
        self.tokenised = False
        self.span: Any = None  # of the trace, where there is one
        client.owner = self

    # Sending
    def begin(self) -> None:
        """A place was free (or became so): route and send."""
        self.entry = None
        self.gateway.active.add(self)
        if self.gateway.tracing is not None:
            self.span = self.gateway.tracing.begin(self, self.gateway.now())
        if self.prepare is None:
            self._dispatch()
        else:
            self.prepare(self._prepared)

    def _prepared(self, tokenised: bool) -> None:
        self.tokenised = tokenised
        if self in self.gateway.active:  # else the client left or time ran out
            self._dispatch()

    def _dispatch(self) -> None:
        gateway = self.gateway
        now = gateway.now()
        allowed = gateway.fleet.allowed(self.query.model, now, self._tried)
        try:
            self.ticket = gateway.fleet.router.route(self.query, now, allowed)
        except NoWorker:
            self._answer_error(503, "no worker is available for this request", retry_after=1)
            return
        gateway.decided(self.ticket, gateway.now() - now)
        self.worker = worker = gateway.fleet.workers[self.ticket.worker.id]
        worker.breaker.sent(now)
        self._attempts += 1
        self._send(worker.pool.take())

    def _send(self, upstream: UpstreamConnection | None) -> None:
        assert self.worker is not None
        now = self.gateway.now()
        if upstream is None:
            self.state_deadline = now + self.gateway.settings.connect_timeout + 1
            self._connecting = asyncio.get_running_loop().create_task(self._connect(self.worker))
            return
        self.state_deadline = min(now + self.gateway.settings.first_byte_timeout, self.deadline)
        self.upstream = upstream
        upstream.send(self, self._bytes(self.worker))

    async def _connect(self, worker: Worker) -> None:
        try:
            upstream = await worker.pool.connect(self.gateway.settings.connect_timeout)
        except (OSError, TimeoutError) as error:
            self._connecting = None
            if isinstance(error, ConnectionRefusedError):
                self.gateway.fleet.gone(worker)
            self.response_failed(f"cannot connect: {error or 'timed out'}", stale=False)
            return
        self._connecting = None
        if upstream.transport.is_closing():  # closed again before it could be told whom to tell
            upstream.close()
            self.response_failed("the worker closed the connection at once", stale=False)
            return
        self._send(upstream)

    def _bytes(self, worker: Worker) -> bytes:
        request = self.request
        lines = [request.method, b" ", worker.pool.base, request.target, b" HTTP/1.1\r\n", worker.head]
        keep_auth = not self.gateway.keys and not self.gateway.settings.worker_api_key
        for name, value in request.headers:
            if name not in DROPPED or (keep_auth and name == b"authorization"):
                lines += (name, b": ", value, b"\r\n")
        lines.append(b"content-length: %d\r\n\r\n" % len(request.body))
        lines.append(request.body)
        return b"".join(lines)

    # The answer (kvist.http.client.Exchange)
    def response_head(self, status: int, headers: list[Header], body: bytes) -> None:
        assert self.worker is not None and self.ticket is not None and self.upstream is not None
        self.status = status
        self.busy = status in BUSY and any(name == b"retry-after" for name, _ in headers)
        if status in RETRYABLE and self._retry(f"answered {status}"):
            return
        self.state_deadline = self.deadline
        if not self.upstream.framed:
            self.request.keep_alive = False  # the body ends with the connection
        out = [(name, value) for name, value in headers if name not in HOP]
        if self.request.header(b"x-kvist-explain") is not None:
            out.append((b"x-kvist-worker", self.worker.id.encode()))
            predicted = self.ticket.decision.predicted
            if predicted is not None:
                out.append((b"x-kvist-predicted-latency", b"%.6f" % predicted))
        if self.gateway.settings.log_requests and not any(name == REQUEST_ID for name, _ in out):
            out.append((REQUEST_ID, self.request.header(REQUEST_ID) or b""))
        self.client.start(status, out, body)
        if body:
            self._saw(body)

    def response_data(self, data: bytes) -> None:
        self._saw(data)
        self.client.write(data)

    def _saw(self, data: bytes) -> None:
        now = self.gateway.now()
        if not self.first_data:
            self.first_data = now
            if self.stream and self.ticket is not None and self.status < 400:
                self.gateway.fleet.router.first_token(self.ticket, now)
        elif self.stream and self.worker is not None:
            self.gateway.metrics.worker(self.worker.id).itl.observe(now - self._last_data)
        self._last_data = now
        if self.stream:
            self._events += data.count(b"data: ")
        self._tail = data[-TAIL:] if len(data) >= TAIL else (self._tail + data)[-TAIL:]

    def response_done(self, reusable: bool) -> None:
        self.upstream = None
        worker = self.worker
        assert worker is not None
        if self.busy:
            worker.breaker.released()
        elif self.status >= 500:
            worker.breaker.failed(self.gateway.now())
        else:
            worker.breaker.succeeded()
        self._settle(Status.OK if self.status < 400 else Status.FAILED)
        self._leave()
        self.client.finish()

    def response_failed(self, reason: str, *, stale: bool) -> None:
        self.upstream = None
        if self.client.request is not self.request:
            return  # the client is gone, `client_lost` took care
        if stale and self.worker is not None:  # nothing reached the worker: a new connection to the same one
            self._send(None)
            return
        if not self.client.started and self._retry(reason):
            return
        assert self.worker is not None
        self.worker.breaker.failed(self.gateway.now())
        self._settle(Status.FAILED)
        if self.client.started:
            self.gateway.metrics.worker(self.worker.id).cut += 1
            self.client.owner = None
            self._leave()
            self.client.abort()
        else:
            self._answer_error(502, f"the worker failed: {reason}")

    def _retry(self, reason: str) -> bool:
        """Send the request to another worker, if the client has seen nothing and one is left."""
        gateway, worker = self.gateway, self.worker
        assert worker is not None
        if self.client.started or self._attempts > gateway.settings.retry_max_retries:
            return False
        tried = {*self._tried, worker.id}
        now = gateway.now()
        if not gateway.fleet.allowed(self.query.model, now, tried):
            return False
        self._tried = tried
        if self.busy:
            worker.breaker.released()
        else:
            worker.breaker.failed(now)
        self.busy = False
        gateway.metrics.worker(worker.id).retries += 1
        gateway.log("retry", worker=worker.id, reason=reason, **request_names(self.request))
        self._drop_upstream()
        self._settle(Status.FAILED)
        self._dispatch()
        return True

    # The client (kvist.http.server.Owner)
    def client_lost(self) -> None:
        gateway = self.gateway
        gateway.metrics.disconnects += 1
        if self.entry is not None:
            gateway.admission.cancel(self.entry)
            self.entry = None
            return
        self._drop_upstream()
        if self.worker is not None:
            self.worker.breaker.released()
        self._settle(Status.CANCELLED)
        self._leave()

    def client_paused(self) -> None:
        self._client_paused = True
        self.state_deadline = min(
            self.gateway.now() + self.gateway.settings.slow_client_timeout, self.deadline
        )
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def client_resumed(self) -> None:
        self._client_paused = False
        self.state_deadline = self.deadline
        if self.upstream is not None:
            self.upstream.transport.resume_reading()

    # Ends
    def check(self, now: float) -> None:
        """Called now and then: enforce the timeouts."""
        if now < self.state_deadline:
            return
        if self._client_paused:
            self.client.abort()  # client_lost follows
            return
        if now < self.deadline and not self.client.started:
            self._drop_upstream()
            self.response_failed("no answer in time", stale=False)
            return
        self._drop_upstream()
        if self.worker is not None:
            self.worker.breaker.failed(now)
        self._settle(Status.FAILED)
        if self.client.started:
            if self.worker is not None:
                self.gateway.metrics.worker(self.worker.id).cut += 1
            self.client.owner = None
            self._leave()
            self.client.abort()
        else:
            self._answer_error(504, "the request took too long")

    def refuse_queued(self) -> None:
        """It waited in the queue for too long."""
        self.entry = None
        self.client.owner = None
        self.gateway.refuse(self.client, 503, "the queue is full: try again later", retry_after=2)

    def _answer_error(self, status: int, message: str, retry_after: int = 0) -> None:
        self.status = status
        self._settle(Status.FAILED)
        self._leave()
        if retry_after:
            self.gateway.refuse(self.client, status, message, retry_after=retry_after)
        else:
            self.client.respond(status, error_body(status, message), kind=JSON)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.exchange = None
            upstream.close()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None

    def _settle(self, status: Status) -> None:
        """End the ticket: learn from it, give back what it reserved."""
        ticket, worker = self.ticket, self.worker
        if ticket is None or worker is None or ticket.done:
            return
        gateway = self.gateway
        now = gateway.now()
        outcome = Outcome(status, latency=now - ticket.routed_at)
        metrics = gateway.metrics.worker(worker.id)
        if status is Status.OK:
            self._read_usage(outcome)
            metrics.latency.observe(now - ticket.routed_at)
            if ticket.first_token_at is not None:
                metrics.ttft.observe(ticket.first_token_at - ticket.routed_at)
            if ticket.decision.predicted is not None:
                metrics.error.observe(abs(now - ticket.routed_at - ticket.decision.predicted))
        metrics.outcomes[status] += 1
        gateway.fleet.router.complete(ticket, outcome, now)
        gateway.ended(self, ticket, outcome)

    def _read_usage(self, outcome: Outcome) -> None:
        """True token counts from the end of the answer, scaled to the index's units."""
        prompt, outcome.output_tokens, cached = read_usage(self._tail, self._events)
        if not prompt or self.ticket is None or self.worker is None:
            return
        if self.tokenised:
            self.gateway.metrics.token_counts[self.query.length == prompt] += 1
        if cached is not None:
            self.worker.tells_cached = True
        elif self.worker.tells_cached and self.request.path in TELLS_CACHED:
            cached = 0  # older vLLM leaves a zero out
        else:
            return
        scale = self.query.length / prompt
        outcome.cached_tokens = round(cached * scale)
        metrics = self.gateway.metrics.worker(self.worker.id)
        metrics.cached_true += cached
        metrics.prompt_true += prompt
        metrics.cached_estimated += self.ticket.decision.cached / scale

    def _leave(self) -> None:
        gateway = self.gateway
        if self in gateway.active:
            gateway.active.discard(self)
            if self.span is not None:
                gateway.left(self)
            gateway.admission.leave()


def request_names(request: Request) -> dict[str, str]:
    """For the log: the request's id, and its trace's where it has one."""
    found = {"request_id": (request.header(REQUEST_ID) or b"").decode("latin-1")}
    parent = request.header(b"traceparent")
    if parent is not None:
        found["trace_id"] = parent[3:35].decode("latin-1")
    return found
