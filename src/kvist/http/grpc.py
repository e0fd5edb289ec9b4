"""The server side of gRPC over HTTP/2 as a bare asyncio protocol: callbacks instead of tasks.

As much of RFC 9113 as streams of small messages need: no push, no priorities, no request compression. Header
blocks are read with `hpack`; the peer is asked to use no dynamic table, so that equal blocks are equal
headers and a dictionary answers for all but the first. Answers need only constant headers.

Memory is bounded by windows: a stream is given more only while what it has to send is small, so a peer that
does not read cannot make it grow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 32
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_ERROR, _, STREAM_CLOSED, SIZE_ERROR, REFUSED = range(8)
COMPRESSION_ERROR, CALM = 9, 11

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 8, 12, 13, 14

STREAM_WINDOW = 256 << 10  # bytes that a stream may have under way to us
CONNECTION_WINDOW = 64 << 20
SENT_LIMIT = 256 << 10  # bytes a stream may owe its peer before its window is no longer refilled
MAX_FRAME = 64 << 10
MAX_BLOCK = 32 << 10
MAX_MESSAGE = 8 << 20
MAX_STREAMS = 10_000
_CACHED_BLOCKS = 256


class Handler(Protocol):
    """Whoever answers a call. After `lost`, or its own `finish`, nothing more is called."""

    def message(self, data: bytes) -> None: ...
    def half_closed(self) -> None:
        """The peer has sent all of its messages."""

    def lost(self) -> None:
        """The peer gave the call up, or the connection broke."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


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


class Failure(Exception):
    """The connection cannot go on; `code` is the HTTP/2 error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


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
                self._give_up(status, "messages must be uncompressed and of at most 8 MiB")
                return
            if len(buffer) - at - 5 < length:
                break
            self.handler.message(buffer[at + 5 : at + 5 + length])
            at += 5 + length
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
        if self.handler is not None:
            self.handler.half_closed()

    def _give_up(self, status: int, text: str) -> None:
        handler = self.handler
        self.finish(status, text)
        if handler is not None:
            handler.lost()

    def drop(self) -> None:
        """Forget the call; its handler is told."""
        handler, self.handler = self.handler, None
        self._queue.clear()
        self.connection.streams.pop(self.id, None)
        if handler is not None:
            handler.lost()

    # To the peer
    def send(self, message: bytes) -> None:
        if self.handler is None or self._finished is not None:
            return
        if not self._started:
            self._started = True
            self.connection.put(frame(HEADERS, END_HEADERS, self.id, _HEAD))
        data = b"\x00" + len(message).to_bytes(4, "big") + message
        connection = self.connection
        if not self.owed and len(data) <= min(self.window, connection.window, connection.peer_frame):
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
        self.handler = _NOBODY
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


class Connection(asyncio.Protocol):
    """`calls` maps a path to what makes the handler of a call; others are answered with UNIMPLEMENTED."""

    def __init__(
        self, calls: dict[bytes, Callable[[Stream], Handler]], everyone: set[Connection] | None = None
    ) -> None:
        self.calls = calls
        self.everyone = everyone if everyone is not None else set()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set on connection
        self.streams: dict[int, Stream] = {}
        self.window = 65535
        self.peer_window = 65535
        self.peer_frame = 16384
        self.paused = False
        self._out: list[bytes] = []
        self._reading = False
        self._buffer = b""
        self._greeted = False
        self._latest = 0  # highest stream number seen
        self._block: bytearray | None = None  # a header block that goes on
        self._block_stream = 0
        self._block_ends = False
        self._taken = 0
        self._static = False  # the peer has given up its dynamic table
        self._paths: dict[bytes, bytes] = {}
        self._going = False
        self._decoder: Any = None

    # asyncio
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        from hpack import Decoder

        self._decoder = Decoder(max_header_list_size=MAX_BLOCK)
        self.transport = transport  # type: ignore[assignment]
        self.everyone.add(self)
        settings = b"".join(
            key.to_bytes(2, "big") + value.to_bytes(4, "big")
            for key, value in ((1, 0), (3, MAX_STREAMS), (4, STREAM_WINDOW), (5, MAX_FRAME), (6, MAX_BLOCK))
        )
        self.transport.write(
            frame(SETTINGS, 0, 0, settings)
            + frame(WINDOW, 0, 0, (CONNECTION_WINDOW - 65535).to_bytes(4, "big"))
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.everyone.discard(self)
        for stream in list(self.streams.values()):
            stream.drop()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        self._reading = True
        try:
            self._feed(self._buffer + data if self._buffer else data)
        except Failure as failure:
            self.put(self._goaway(failure.code, str(failure)))
            self._flush()
            self.transport.close()
            return
        finally:
            self._reading = False
        self._flush()

    def put(self, data: bytes) -> None:
        self._out.append(data)

    def flush_soon(self) -> None:
        """Now, unless more may follow in this turn."""
        if not self._reading:
            self._flush()

    def _flush(self) -> None:
        if self._out and not self.transport.is_closing():
            self.transport.write(b"".join(self._out))
        self._out.clear()

    # Going away
    def go_away(self) -> None:
        """Take no new calls; close once those under way have ended."""
        self._going = True
        self.put(self._goaway(NO_ERROR, ""))
        self._flush()
        self.stream_ended()

    def stream_ended(self) -> None:
        if self._going and not self.streams:
            self._flush()
            self.transport.close()

    def _goaway(self, code: int, text: str) -> bytes:
        payload = self._latest.to_bytes(4, "big") + code.to_bytes(4, "big") + text.encode()
        return frame(GOAWAY, 0, 0, payload)

    # Frames
    def _feed(self, data: bytes) -> None:
        at = 0
        if not self._greeted:
            if len(data) < len(PREFACE) and PREFACE.startswith(data):
                self._buffer = data
                return
            if not data.startswith(PREFACE):
                raise Failure(PROTOCOL_ERROR, "not an HTTP/2 connection")
            self._greeted = True
            at = len(PREFACE)
        while len(data) - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if length > MAX_FRAME:
                raise Failure(SIZE_ERROR, "a frame is too large")
            end = at + 9 + length
            if len(data) < end:
                break
            kind, flags = data[at + 3], data[at + 4]
            number = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
            if self._block is not None and (kind != CONTINUATION or number != self._block_stream):
                raise Failure(PROTOCOL_ERROR, "a header block was broken off")
            if kind == DATA:
                self._data(flags, number, data[at + 9 : end])
            else:
                self._other(kind, flags, number, data[at + 9 : end])
            at = end
        self._buffer = data[at:]

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            self._headers(flags, number, payload)
        elif kind == WINDOW:
            self._window(number, payload)
        elif kind == RST:
            stream = self.streams.get(number)
            if stream is not None:
                stream.drop()
                self.stream_ended()
        elif kind == SETTINGS:
            self._settings(flags, number, payload)
        elif kind == PING:
            if len(payload) != 8 or number:
                raise Failure(SIZE_ERROR, "a malformed PING")
            if not flags & ACK:
                self.put(frame(PING, ACK, 0, payload))
        elif kind == CONTINUATION:
            self._continuation(flags, payload)
        elif kind == PUSH:
            raise Failure(PROTOCOL_ERROR, "clients do not push")

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._taken += size
        if self._taken > CONNECTION_WINDOW // 2:
            self.put(frame(WINDOW, 0, 0, self._taken.to_bytes(4, "big")))
            self._taken = 0
        stream = self.streams.get(number)
        if stream is None or stream.remote_closed:
            if number == 0 or number > self._latest:
                raise Failure(PROTOCOL_ERROR, "DATA on a stream that is not open")
            return  # of a call that has ended here
        if flags & PADDED:
            payload = _unpadded(payload)
        if payload or not flags & END_STREAM:
            stream.received(payload, size)
        if flags & END_STREAM:
            stream.ended()

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        if number % 2 == 0:
            raise Failure(PROTOCOL_ERROR, "HEADERS on a stream of the server's")
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITIZED:
            payload = payload[5:]
        if flags & END_HEADERS:
            self._call(number, payload, bool(flags & END_STREAM))
        else:
            self._block, self._block_stream = bytearray(payload), number
            self._block_ends = bool(flags & END_STREAM)

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise Failure(PROTOCOL_ERROR, "CONTINUATION of nothing")
        self._block += payload
        if len(self._block) > MAX_BLOCK:
            raise Failure(CALM, "a header block is too large")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._call(self._block_stream, block, self._block_ends)

    def _call(self, number: int, block: bytes, ends: bool) -> None:
        path = self._path(block)  # before anything else: the decoder has to see every block
        stream = self.streams.get(number)
        if stream is not None:  # trailers
            if ends and not stream.remote_closed:
                stream.ended()
            return
        if number <= self._latest:
            return
        if self._going or len(self.streams) >= MAX_STREAMS:
            self.put(frame(RST, 0, number, REFUSED.to_bytes(4, "big")))
            return
        self._latest = number
        self.streams[number] = stream = Stream(self, number)
        make = self.calls.get(path)
        if make is None:
            stream.handler = _NOBODY
            stream.remote_closed = ends
            stream.finish(UNIMPLEMENTED, "no such method")
            return
        stream.handler = make(stream)
        if ends:
            stream.ended()

    def _path(self, block: bytes) -> bytes:
        known = self._paths.get(block) if self._static else None
        if known is not None:
            return known
        from hpack import HPACKError

        try:
            headers = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise Failure(COMPRESSION_ERROR, f"headers: {error}") from None
        path = next((bytes(value) for name, value in headers if name == b":path"), b"")
        if (
            self._static
            and len(self._paths) < _CACHED_BLOCKS
            and not self._decoder.header_table.dynamic_entries
        ):
            self._paths[block] = path
        return path

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number or len(payload) % 6:
            raise Failure(SIZE_ERROR, "malformed SETTINGS")
        if flags & ACK:
            self._static = True  # from here on its blocks stand for themselves
            return
        for at in range(0, len(payload), 6):
            key, value = (
                int.from_bytes(payload[at : at + 2], "big"),
                int.from_bytes(payload[at + 2 : at + 6], "big"),
            )
            if key == 4:
                if value > 0x7FFFFFFF:
                    raise Failure(FLOW_ERROR, "a window too large")
                for stream in self.streams.values():
                    stream.window += value - self.peer_window
                self.peer_window = value
            elif key == 5:
                if not 16384 <= value < 1 << 24:
                    raise Failure(PROTOCOL_ERROR, "a frame size out of range")
                self.peer_frame = value
        self.put(frame(SETTINGS, ACK, 0))
        self._pump()

    def _window(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Failure(SIZE_ERROR, "a malformed WINDOW_UPDATE")
        more = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if number == 0:
            self.window += more
            if not more or self.window > 0x7FFFFFFF:
                raise Failure(FLOW_ERROR, "a window out of range")
            self._pump()
            return
        stream = self.streams.get(number)
        if stream is not None:
            stream.window += more
            if not more or stream.window > 0x7FFFFFFF:
                raise Failure(FLOW_ERROR, "a window out of range")
            stream.pump()

    def _pump(self) -> None:
        for stream in list(self.streams.values()):
            if stream.owed:
                stream.pump()
        self.flush_soon()


class _Nobody:
    def message(self, data: bytes) -> None: ...
    def half_closed(self) -> None: ...
    def lost(self) -> None: ...


_NOBODY = _Nobody()


def _unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Failure(PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
