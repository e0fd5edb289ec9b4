"""The embedded engine: the engine model behind an OpenAI-compatible HTTP server.

A model of an engine, for trying, testing and demonstrating routing without a GPU: batching, caching,
eviction and timing are modelled, the text is filler. It says so at start-up and in every answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvist.engine import api
from kvist.engine.driver import Driver
from kvist.engine.kv_events import Publisher
from kvist.engine.metrics import EngineMetrics
from kvist.engine.request import Refused, Request
from kvist.engine.responses import Response, messages
from kvist.http.files import allow_many
from kvist.http.garbage import Garbage
from kvist.http.server import Connection, Connections, error_body
from kvist.http.server import Request as HttpRequest
from kvist.model import Query
from kvist.workloads.base import text_tokens

JSON = b"application/json"
RESPONSES = "/v1/responses"
GENERATING = ("/v1/chat/completions", "/v1/completions", RESPONSES, "/generate")
SERVER = (b"server", b"kvist-engine (a model of an engine: its text is filler)")  # of every answer
DRAIN_SECONDS = 30.0  # in which requests under way may end after SIGTERM


class Answer:
    """One request at the engine, answered at once or token by token."""

    def __init__(
        self, server: EngineServer, client: Connection, path: str, query: Query, body: api.Body
    ) -> None:
        self.server = server
        self.client = client
        self.path = path
        self.query = query
        self.number = int(query.id)
        self.stream = bool(body.stream)
        self.created = int(time.time())
        self.tool = api.forced_tool(body)
        self.response: Response | None = None
        if path == RESPONSES:
            self.response = Response(self.number, self.created, server.model, body.max_output_tokens)
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.pieces = api.pieces(query.output_tokens)
        self.sent = 0
        self.last_token = 0.0
        self.request: Request | None = None
        client.owner = self

    def token(self, request: Request, last: bool) -> None:
        """The driver has one more token."""
        metrics, now = self.server.metrics, self.server.driver.now()
        if self.sent == 0:
            metrics.ttft.observe(now - request.submitted)
        else:
            metrics.itl.observe(now - self.last_token)
        self.last_token = now
        self.sent += 1
        if last:
            metrics.latency.observe(now - request.submitted)
        if self.stream:
            self._stream_token(request, last)
        elif last:
            self.client.respond(200, msgspec.json.encode(self._whole(request)), kind=JSON)

    def _whole(self, request: Request) -> dict[str, Any]:
        text = "".join(self.pieces)
        if self.response is not None:
            return self.response.whole(text, api.usage(self.query, request.cached, self.sent))
        return api.whole(
            self.path,
            self.number,
            self.created,
            self.server.model,
            self.query,
            text,
            request.cached,
            self.tool,
        )

    def _stream_token(self, request: Request, last: bool) -> None:
        first = self.sent == 1
        if first:
            head = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"transfer-encoding", b"chunked"),
            ]
            self.client.start(200, head)
        text = self.pieces[self.sent - 1]
        used = api.usage(self.query, request.cached, self.sent) if last else None
        if self.response is not None:
            payload = self.response.events(text, first, used)
        else:
            payload = b"".join(b"data: " + event + b"\n\n" for event in self._events(text, first, used))
        self.client.write(b"%x\r\n%s\r\n" % (len(payload), payload) + (b"0\r\n\r\n" if last else b""))
        if last:
            self.client.finish()

    def _events(self, text: str, first: bool, used: dict[str, Any] | None) -> list[bytes]:
        model, last = self.server.model, used is not None
        data = api.piece(self.path, self.number, self.created, model, text, first, last, self.tool)
        events = [msgspec.json.encode(data)]
        if last:
            if self.with_usage:
                events.append(msgspec.json.encode({**data, "choices": [], "usage": used}))
            events.append(b"[DONE]")
        return events

    # kvist.http.server.Owner
    def client_lost(self) -> None:
        if self.request is not None:
            self.server.driver.abort(self.request)
            self.server.metrics.disconnects += 1

    def client_paused(self) -> None:
        """Answers are bounded by max_tokens: what a slow reader leaves in memory is bounded too."""

    def client_resumed(self) -> None:
        pass


class EngineServer:
    """Must be made inside a running event loop. max_waiting: requests that may queue before 503."""

    def __init__(
        self,
        driver: Driver,
        model: str,
        *,
        max_waiting: int = 1024,
        publisher: Publisher | None = None,
    ) -> None:
        self.driver = driver
        self.model = model
        self.max_waiting = max_waiting
        self.publisher = publisher
        self.metrics = EngineMetrics(driver, model, publisher)
        self.connections = Connections(self.handle, headers=(SERVER,))
        self._numbers = itertools.count()
        self._created = int(time.time())

    def handle(self, request: HttpRequest, client: Connection) -> None:
        """Answer one HTTP request."""
        route = (request.method, request.path)
        if request.path in GENERATING and request.method == b"POST":
            self._generate(request, client)
        elif route == (b"POST", "/v1/embeddings"):
            self._checked(client, lambda: api.embeddings(self.model, api.parse(request.body)))
        elif route in ((b"POST", "/tokenize"), (b"POST", "/v1/tokenize")):
            self._checked(client, lambda: self._tokenize(request))
        elif route == (b"GET", "/v1/models"):
            entry = {
                "id": self.model,
                "object": "model",
                "created": self._created,
                "owned_by": "kvist",
                "max_model_len": self.driver.engine.cache.capacity,
            }
            self._json(client, {"object": "list", "data": [entry]})
        elif route == (b"GET", "/health"):
            self._json(client, {"status": "ok", "engine": "modelled by kvist"})
        elif route == (b"GET", "/metrics"):
            client.respond(200, self.metrics.exposition(), kind=b"text/plain; version=0.0.4")
        elif request.path == "/flush_cache" and request.method in (b"POST", b"GET"):
            self._flush(client)
        else:
            client.respond(404, error_body(404, f"no such path: {request.path}"), kind=JSON)

    def _generate(self, request: HttpRequest, client: Connection) -> None:
        try:
            body = api.parse(request.body)
            talk = messages(body) if request.path == RESPONSES else None
            query = api.to_query(next(self._numbers), request.path, body, talk)
            api.forced_tool(body)
        except api.BadRequest as error:
            client.respond(400, error_body(400, str(error)), kind=JSON)
            return
        if body.model not in (None, "", self.model):
            text = f"The model `{body.model}` does not exist."
            client.respond(404, error_body(404, text, "model_not_found"), kind=JSON)
            return
        if len(self.driver.engine.waiting) >= self.max_waiting:
            head = [(b"retry-after", b"1")]
            client.respond(503, error_body(503, "too many requests are waiting"), head, kind=JSON)
            return
        answer = Answer(self, client, request.path, query, body)
        try:
            answer.request = self.driver.submit(query, answer.token)
        except Refused as error:
            client.owner = None
            client.respond(400, error_body(400, str(error), "context_length_exceeded"), kind=JSON)

    def _tokenize(self, request: HttpRequest) -> dict[str, Any]:
        body = api.parse(request.body)
        packed = (
            api.render(body.messages, body.tools) if body.messages else text_tokens(str(body.prompt or ""))
        )
        tokens = [int.from_bytes(packed[i : i + 4], "little") for i in range(0, len(packed), 4)]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.driver.engine.cache.capacity}

    def _flush(self, client: Connection) -> None:
        try:
            self.driver.engine.cache.reset()
        except ValueError as error:
            client.respond(409, error_body(409, str(error)), kind=JSON)
            return
        self.flush_events()
        self._json(client, {"flushed": True})

    def _checked(self, client: Connection, make: Callable[[], dict[str, Any]]) -> None:
        try:
            self._json(client, make())
        except api.BadRequest as error:
            client.respond(400, error_body(400, str(error)), kind=JSON)

    def _json(self, client: Connection, data: dict[str, Any]) -> None:
        client.respond(200, msgspec.json.encode(data), kind=JSON)

    def flush_events(self) -> None:
        if self.publisher is not None:
            self.publisher.flush()


async def serve(
    make: Callable[[], EngineServer], host: str, port: int, ready: Callable[[int], None] = lambda port: None
) -> None:
    """Serve until SIGTERM or SIGINT, then let requests under way end; a second signal cuts them.

    Raises OSError if the address is taken.
    """
    server = make()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server.connections), host, port, backlog=4096)
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    ready(listener.sockets[0].getsockname()[1])
    garbage = Garbage(time.monotonic())
    while not stop.is_set():
        await _tick(server, stop)
        garbage.sweep(time.monotonic(), idle=not server.driver.engine.running)
    listener.close()
    connections = server.connections
    connections.closing = True
    end = time.monotonic() + DRAIN_SECONDS
    while any(c.request for c in connections.open) and not hurry.is_set() and time.monotonic() < end:
        await _tick(server, hurry, 0.02)
    server.driver.close()
    for connection in list(connections.open):
        connection.transport.close() if connection.request is None else connection.abort()
    await asyncio.sleep(0)
    if server.publisher is not None:
        server.publisher.close()


async def _tick(server: EngineServer, event: asyncio.Event, idle: float = 1.0) -> None:
    server.flush_events()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02 if server.publisher else idle):
            await event.wait()


def run(make: Callable[[], EngineServer], host: str, port: int, ready: Callable[[int], None]) -> None:
    """`serve` in an event loop of its own, uvloop where it is installed."""
    allow_many()
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(serve(make, host, port, ready))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(make, host, port, ready))
