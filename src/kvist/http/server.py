"""The server side: one protocol object for each client connection.

Requests of a connection are handled one at a time (a pipelined one waits, with reading paused), bodies are
collected up to a limit, and a handler answers through the connection: `respond` for a whole answer, or
`start`, `write`, `finish`. Slow senders are cut by `sweep`, which the host calls now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

import httptools

Header = tuple[bytes, bytes]

_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


@dataclass(slots=True)
class Limits:
    """max_body in bytes, header_seconds and body_seconds: how long a client may take to send each."""

    max_body: int = 32 << 20
    max_header: int = 32 << 10
    header_seconds: float = 30.0
    body_seconds: float = 60.0
    idle_seconds: float = 120.0


@dataclass(slots=True, eq=False)
class Request:
    """A whole request. Header names are lower case; `path` is without the query string."""

    method: bytes
    target: bytes
    path: str
    headers: list[Header]
    body: bytes = b""
    keep_alive: bool = True

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Owner(Protocol):
    """Whoever answers a request and wants to know how the client fares."""

    def client_lost(self) -> None: ...
    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...


@dataclass(slots=True, eq=False)
class Connections:
    """All open connections of a server, and what a request is answered with."""

    handler: Callable[[Request, Connection], None]
    limits: Limits = field(default_factory=Limits)
    open: set[Connection] = field(default_factory=set)
    closing: bool = False
    headers: tuple[Header, ...] = ()  # of every answer
    refused: Callable[[int], None] = lambda status: None  # told of requests that never reached the handler

    def sweep(self, now: float) -> None:
        """Cut connections that took too long to send a request, or sat idle."""
        for connection in list(self.open):
            connection.check(now)


class Connection(asyncio.Protocol):
    def __init__(self, server: Connections) -> None:
        self.server = server
        self.owner: Owner | None = None
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set on connection
        self.request: Request | None = None  # being answered
        self._parser: Any = None
        self._reset()
        self._pending: list[Request] = []
        self._since = 0.0
        self._started = False  # the answer's head is out
        self._chunked = False

    def _reset(self) -> None:
        self._url = b""
        self._headers: list[Header] = []
        self._header_size = 0
        self._body: list[bytes] = []
        self._body_size = 0
        self._in_request = False
        self._headers_done = False

    # asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpRequestParser(self)
        self._since = time.monotonic()
        self.server.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.open.discard(self)
        self._parser = None  # it refers back: a cycle would wait for a collection
        owner, self.owner = self.owner, None
        self.request = None
        self._pending.clear()
        if owner is not None:
            owner.client_lost()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.refuse(HTTPStatus.BAD_REQUEST, "protocol upgrades are not supported")
        except httptools.HttpParserCallbackError as error:
            self._broken(error.__context__ or error)
        except httptools.HttpParserError:
            if not self.transport.is_closing():
                self.refuse(HTTPStatus.BAD_REQUEST, "malformed HTTP request")

    def pause_writing(self) -> None:
        if self.owner is not None:
            self.owner.client_paused()

    def resume_writing(self) -> None:
        if self.owner is not None:
            self.owner.client_resumed()

    # httptools
    def on_message_begin(self) -> None:
        self._reset()
        self._in_request = True
        self._since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        self._header_size += len(name) + len(value)
        if self._header_size > self.server.limits.max_header:
            self._count_header(0)

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > self.server.limits.max_header:
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request headers too large")

    def on_headers_complete(self) -> None:
        self._headers_done = True
        for name, value in self._headers:
            if name == b"content-length" and int(value) > self.server.limits.max_body:
                self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large")
            elif name == b"expect" and value.lower() == b"100-continue":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_size += len(data)
        if self._body_size > self.server.limits.max_body:
            self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large")

    def on_message_complete(self) -> None:
        if self.transport.is_closing():
            return
        self._in_request = False
        path = self._url.split(b"?", 1)[0].decode("latin-1")
        request = Request(
            self._parser.get_method(),
            self._url,
            path,
            self._headers,
            self._body[0] if len(self._body) == 1 else b"".join(self._body),
            self._parser.should_keep_alive(),
        )
        if self.request is None:
            self._handle(request)
        else:  # pipelined: answer in order
            self._pending.append(request)
            self.transport.pause_reading()

    def _handle(self, request: Request) -> None:
        self.request = request
        self._started = False
        self.server.handler(request, self)

    # Answers
    def respond(self, status: int, body: bytes = b"", headers: Iterable[Header] = (), *, kind: bytes) -> None:
        """A whole answer; the next request of the connection follows."""
        if self.request is None:
            return
        head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
        self.start(status, head)
        if body and self.request.method != b"HEAD":
            self.transport.write(body)
        self.finish()

    def start(self, status: int, headers: Iterable[Header], body: bytes = b"") -> None:
        """The head of an answer as given (framing included), with the first bytes of its body."""
        assert self.request is not None
        self._started = True
        lines = [_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n".encode()]
        lines += [name + b": " + value + b"\r\n" for name, value in headers]
        lines += [name + b": " + value + b"\r\n" for name, value in self.server.headers]
        if not self.request.keep_alive or self.server.closing:
            self.request.keep_alive = False
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        lines.append(body)
        self.transport.write(b"".join(lines))

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def finish(self) -> None:
        """The answer is complete: close, or go on with the next request."""
        request, self.request, self.owner = self.request, None, None
        if request is None or self.transport.is_closing():
            return
        self._since = time.monotonic()
        if not request.keep_alive:
            self.transport.close()
        elif self._pending:
            following = self._pending.pop(0)
            if not self._pending:
                self.transport.resume_reading()
            self._handle(following)

    def abort(self) -> None:
        """Cut the connection: the only honest end of an answer that cannot be completed."""
        self.transport.abort()

    @property
    def started(self) -> bool:
        """Whether the client has seen any of the answer."""
        return self._started

    def refuse(self, status: int, message: str) -> None:
        """Answer a request that cannot be read and close."""
        if self.transport.is_closing():
            return
        self.server.refused(status)
        if self.request is None:
            self._url = self._url or b"/"
            self.request = Request(b"GET", b"/", "/", [], keep_alive=False)
            self.respond(status, error_body(status, message), kind=b"application/json")
        self.transport.close()

    def _broken(self, error: BaseException) -> None:
        """Our own fault while handling a request: tell the log and the client, and go on with the others."""
        asyncio.get_running_loop().call_exception_handler(
            {"message": "error while handling a request", "exception": error}
        )
        if self.request is not None and not self._started:
            self.request.keep_alive = False
            body = error_body(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")
            self.respond(HTTPStatus.INTERNAL_SERVER_ERROR, body, kind=b"application/json")
        self.transport.close()

    def check(self, now: float) -> None:
        limits = self.server.limits
        if self.request is not None:
            return
        waited = now - self._since
        if self.transport.is_closing():  # the rest of an answer that the client does not read
            if waited > limits.body_seconds:
                self.transport.abort()
            return
        if self._in_request:
            if waited > (limits.body_seconds if self._headers_done else limits.header_seconds):
                self.refuse(HTTPStatus.REQUEST_TIMEOUT, "the request took too long to arrive")
        elif waited > limits.idle_seconds or self.server.closing:
            self.transport.close()


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """An error in the shape of the OpenAI API."""
    import msgspec

    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return msgspec.json.encode({"error": error})
