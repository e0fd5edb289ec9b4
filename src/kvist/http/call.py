"""One gRPC call on an HTTP/2 stream: messages in and out, within the peer's windows and our own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from kvist.http.frames import DATA, END_HEADERS, END_STREAM, HEADERS, NO_ERROR, RST, WINDOW, frame

if TYPE_CHECKING:
    from kvist.http.grpc import Connection

OK, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 5, 8, 12, 13

STREAM_WINDOW = 256 << 10  # bytes that a stream may have under way to us
SENT_LIMIT = 256 << 10  # bytes a stream may owe its peer before its window is no longer refilled
MAX_MESSAGE = 4 << 20  # as gRPC has it by default


class Handler(Protocol):
    """Whoever answers a call. After `lost`, or its own `finish`, nothing more is called."""

    def message(self, data: bytes) -> None: ...
    def half_closed(self) -> None:
        """The peer has sent all of its messages."""

    def lost(self) -> None:
        """The peer gave the call up, or the connection broke."""


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing and without Huffman code; both parts shorter than 127 bytes."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


_HEAD = b"\x88" + _literal(b"content-type", b"application/grpc")  # 0x88 is `:status: 200`


def _trailers(status: int, text: str) -> bytes:
    block = _literal(b"grpc-status", b"%d" % status)
    return block + (_literal(b"grpc-message", _plain(text)) if text else b"")


def _plain(text: str) -> bytes:
    """Percent-encoded as gRPC has it, cut to what `_literal` takes."""
    return "".join(c if " " <= c <= "~" and c != "%" else "?" for c in text).encode()[:120]


class _Nobody:
    def message(self, data: bytes) -> None: ...
    def half_closed(self) -> None: ...
    def lost(self) -> None: ...


NOBODY = _Nobody()


class Stream:
    """One call. `send` and `finish` may be called at any time; after `finish` they do nothing."""

    __slots__ = (
        "_buffer",
        "_finished",
        "_queue",
        "_started",
        "_taken",
        "connection",
        "handler",
        "id",
        "owed",
        "remote_closed",
        "window",
    )

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.id = number
        self.handler: Handler | None = None
        self.window = connection.peer_window  # what the peer takes of us
        self.owed = 0  # bytes queued for the peer
        self.remote_closed = False
        self._queue: deque[bytes] = deque()
        self._buffer = b""
        self._taken = 0  # received bytes that the peer's window was not refilled for
        self._started = False
        self._finished: bytes | None = None  # trailers, once all is queued

    # From the peer
    def received(self, data: bytes, size: int) -> None:
        self._taken += size
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while self.handler is not None and len(buffer) - at >= 5:
            length = int.from_bytes(buffer[at + 1 : at + 5], "big")
            if buffer[at] or length > MAX_MESSAGE:
                status = UNIMPLEMENTED if buffer[at] else RESOURCE_EXHAUSTED
                self._give_up(status, "messages must be uncompressed and of at most 4 MiB")
                return
            if len(buffer) - at - 5 < length:
                break
            message, at = buffer[at + 5 : at + 5 + length], at + 5 + length
            if not self._tell(self.handler.message, message):
                self._give_up(INTERNAL, "internal error")
                return
        self._buffer = buffer[at:] if at else buffer
        self.refill()

    def refill(self) -> None:
        if self.handler is None or self.remote_closed or self.owed >= SENT_LIMIT:
            return
        if self._taken > STREAM_WINDOW // 2:
            self.connection.put(frame(WINDOW, 0, self.id, self._taken.to_bytes(4, "big")))
            self._taken = 0

    def ended(self) -> None:
        self.remote_closed = True
        if self.handler is not None and not self._tell(self.handler.half_closed):
            self._give_up(INTERNAL, "internal error")

    def _tell(self, what: Callable[..., None], *values: bytes) -> bool:
        """Call the handler; whether it went well. One call's fault must not end its connection's others."""
        try:
            what(*values)
        except Exception as error:
            self.connection.broken(error)
            return False
        return True

    def _give_up(self, status: int, text: str) -> None:
        handler = self.handler
        self.finish(status, text)
        if handler is not None:
            self._tell(handler.lost)

    def drop(self) -> None:
        """Forget the call; its handler is told."""
        handler, self.handler = self.handler, None
        self._queue.clear()
        self.connection.streams.pop(self.id, None)
        if handler is not None:
            self._tell(handler.lost)

    # To the peer
    def send(self, message: bytes) -> None:
        if self.handler is None or self._finished is not None:
            return
        if not self._started:
            self._started = True
            self.connection.put(frame(HEADERS, END_HEADERS, self.id, _HEAD))
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        connection = self.connection
        room = min(self.window, connection.window, connection.peer_frame)
        if len(data) <= room and not self.owed and not connection.paused:
            self.window -= len(data)
            connection.window -= len(data)
            connection.put(frame(DATA, 0, self.id, data))
        else:
            self.owed += len(data)
            self._queue.append(data)
            self.pump()
        connection.flush_soon()

    def finish(self, status: int = OK, text: str = "") -> None:
        if self.handler is None or self._finished is not None:
            return
        self._finished = _trailers(status, text)
        self.handler = NOBODY
        self.pump()
        self.connection.flush_soon()

    def pump(self) -> None:
        """Send what the windows allow; then the trailers, if that was all."""
        connection = self.connection
        while self._queue:
            size = min(self.window, connection.window, connection.peer_frame)
            if size <= 0 or connection.paused:
                return
            data = self._queue.popleft()
            if len(data) > size:
                self._queue.appendleft(data[size:])
                data = data[:size]
            self.window -= len(data)
            connection.window -= len(data)
            self.owed -= len(data)
            connection.put(frame(DATA, 0, self.id, data))
        self.refill()
        if self._finished is not None and self.handler is not None:
            block = self._finished if self._started else _HEAD + self._finished
            connection.put(frame(HEADERS, END_HEADERS | END_STREAM, self.id, block))
            if not self.remote_closed:
                connection.put(frame(RST, 0, self.id, NO_ERROR.to_bytes(4, "big")))
            self.handler = None
            connection.streams.pop(self.id, None)
            connection.stream_ended()
