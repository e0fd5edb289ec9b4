"""The client side: pooled keep-alive connections to one worker, callbacks instead of tasks.

A response is parsed for its framing only; what follows its head is handed on byte for byte as it arrives.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

Header = tuple[bytes, bytes]


class Exchange(Protocol):
    """Whoever waits for a response. Exactly one of `response_done` and `response_failed` is called, last."""

    def response_head(self, status: int, headers: list[Header], body: bytes) -> None:
        """The head is in; `body` holds the raw bytes that came behind it."""

    def response_data(self, data: bytes) -> None: ...
    def response_done(self, reusable: bool) -> None: ...
    def response_failed(self, reason: str, *, stale: bool) -> None:
        """`stale`: a kept connection had been closed by the worker before the request reached it."""


class UpstreamConnection(asyncio.Protocol):
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set on connection
        self.exchange: Exchange | None = None
        self.used = 0
        self.parked_at = 0.0
        self._parser: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, exchange: Exchange, request: bytes, *, keep: bool = True) -> None:
        """`keep`: give the connection back to the pool afterwards, if the worker keeps it too."""
        self.exchange = exchange
        self.used += 1
        self._may_keep = keep
        if self._parser is None:  # a kept connection keeps its parser: it is ready for the next answer
            self._parser = httptools.HttpResponseParser(self)
        self._head = b""
        self._headers: list[Header] = []
        self._in_head = True
        self._complete = False
        self._framed = False
        self._keep = False
        self._received = False
        self.transport.write(request)

    @property
    def framed(self) -> bool:
        """Whether the end of the answer's body can be told, other than by the end of the connection."""
        return self._framed

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:  # unasked bytes on a kept connection
            self.close()
            return
        self._received = True
        if not self._in_head:
            if self._feed(data):
                exchange.response_data(data)
                if self._complete:
                    self._end()
            return
        self._head = raw = self._head + data if self._head else data
        end = raw.find(b"\r\n\r\n")
        if (end if end >= 0 else len(raw)) > self.pool.max_head:
            self.fail("the response head is too large")
            return
        if end < 0:
            return
        if raw[9:12] == b"100":  # an interim answer: the real one follows
            self._head = b""
            if raw[end + 4 :]:
                self.data_received(raw[end + 4 :])
            return
        if not self._feed(raw):
            return
        self._in_head = False
        exchange.response_head(self._parser.get_status_code(), self._headers, raw[end + 4 :])
        if self._complete and self.exchange is exchange:
            self._end()

    def _feed(self, data: bytes) -> bool:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._complete:
                self.fail("the response is not valid HTTP")
                return False
            self._framed = False  # bytes behind the answer: the connection is not kept
        return True

    def _end(self) -> None:
        exchange, self.exchange = self.exchange, None
        reusable = self._may_keep and self._framed and self._keep and not self.transport.is_closing()
        if reusable:
            self.pool.park(self)
        else:
            self.close()
        if exchange is not None:
            exchange.response_done(reusable)

    def fail(self, reason: str, *, stale: bool = False) -> None:
        exchange, self.exchange = self.exchange, None
        self.close()
        if exchange is not None:
            exchange.response_failed(reason, stale=stale)

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.gone(self)
        self._parser = None  # it refers back: a cycle would wait for a collection
        if self.exchange is None:
            return
        if not self._in_head and not self._framed:  # a body that ends with the connection
            exchange, self.exchange = self.exchange, None
            exchange.response_done(False)
        elif not self._received and self.used > 1:
            self.fail("the worker had closed the connection", stale=True)
        else:
            self.fail("the worker closed the connection before its answer was complete")

    def pause_writing(self) -> None:
        """Request bodies are bounded and sent at once: nothing to hold back."""

    def resume_writing(self) -> None:
        pass

    def close(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()
        self.pool.gone(self)

    # httptools
    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value))
        if name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self._framed = True

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() in (204, 304):
            self._framed = True

    def on_message_complete(self) -> None:
        self._complete = True
        self._keep = self._parser.should_keep_alive()  # no longer told afterwards


class Pool:
    """Connections to one worker. `url` is its base URL; raises ValueError for one that is not http(s)."""

    max_head = 64 << 10

    def __init__(self, url: str, *, keep: int = 256, idle_seconds: float = 30.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"worker URL {url!r} must look like http://host:port")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.authority = parts.netloc.rpartition("@")[2].encode()
        self.base = parts.path.rstrip("/").encode()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._idle: list[UpstreamConnection] = []
        self._all: set[UpstreamConnection] = set()
        self._keep = keep
        self._idle_seconds = idle_seconds

    @property
    def open(self) -> int:
        """Connections, in use and kept."""
        return len(self._all)

    def take(self) -> UpstreamConnection | None:
        """A kept connection, the one used last first."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def connect(self, seconds: float) -> UpstreamConnection:
        """A new connection. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds):
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(self), self.host, self.port, ssl=self._tls
            )
        self._all.add(connection)
        return connection

    def park(self, connection: UpstreamConnection) -> None:
        if len(self._idle) >= self._keep:
            connection.close()
            return
        connection.parked_at = time.monotonic()
        self._idle.append(connection)

    def gone(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)

    def sweep(self, now: float) -> None:
        """Close connections that were not used for a while."""
        while self._idle and now - self._idle[0].parked_at > self._idle_seconds:
            self._idle.pop(0).close()

    def retire(self) -> None:
        """Close what is idle, and what is in use as soon as its answer is complete."""
        self._keep = 0
        while self._idle:
            self._idle.pop().close()

    def close(self) -> None:
        for connection in list(self._all):
            connection.close()
        self._idle.clear()


class Fetch:
    """One small request outside the proxy path (health, models, metrics): the whole answer, awaited."""

    def __init__(self, max_body: int = 4 << 20) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = bytearray()
        self._chunked = False
        self._max = max_body

    def response_head(self, status: int, headers: list[Header], body: bytes) -> None:
        self._status = status
        self._chunked = any(n == b"transfer-encoding" and b"chunked" in v.lower() for n, v in headers)
        self.response_data(body)

    def response_data(self, data: bytes) -> None:
        if len(self._body) + len(data) <= self._max:
            self._body += data

    def response_done(self, reusable: bool) -> None:
        if not self.done.done():
            self.done.set_result((self._status, dechunk(self._body) if self._chunked else bytes(self._body)))

    def response_failed(self, reason: str, *, stale: bool) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))


def dechunk(data: bytes | bytearray) -> bytes:
    """The content of a complete chunked body."""
    out, at = bytearray(), 0
    while True:
        end = data.find(b"\r\n", at)
        size = int(bytes(data[at:end]).split(b";")[0] or b"0", 16) if end >= 0 else 0
        if not size:
            return bytes(out)
        out += data[end + 2 : end + 2 + size]
        at = end + 4 + size


async def fetch(
    pool: Pool, path: str, *, seconds: float, headers: list[Header] | None = None
) -> tuple[int, bytes]:
    """GET a path of a worker: status and body. Raises OSError or TimeoutError."""
    connection = await pool.connect(seconds)
    lines = [b"GET " + pool.base + path.encode() + b" HTTP/1.1\r\nhost: " + pool.authority + b"\r\n"]
    lines += [name + b": " + value + b"\r\n" for name, value in headers or []]
    waiting = Fetch()
    # Kept, the connection could already carry somebody's request when it is closed below.
    connection.send(waiting, b"".join([*lines, b"connection: close\r\n\r\n"]), keep=False)
    try:
        async with asyncio.timeout(seconds):
            return await waiting.done
    finally:
        connection.exchange = None
        connection.close()
