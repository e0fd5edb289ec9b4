"""The server side of gRPC over HTTP/2 as a bare asyncio protocol: callbacks instead of tasks.

As much of RFC 9113 as streams of small messages need: no push, no priorities, no request compression. Header
blocks are read with `hpack`; the peer is asked to use no dynamic table, so that equal blocks are equal
headers and a dictionary answers for all but the first. Answers need only constant headers.

Memory is bounded by windows: a stream is given more only while what it has to send is small, so a peer that
does not read cannot make it grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvist.http.call import NOBODY, STREAM_WINDOW, UNIMPLEMENTED, Handler, Stream
from kvist.http.frames import (
    ACK,
    CALM,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FLOW_ERROR,
    GOAWAY,
    HEADERS,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PROTOCOL_ERROR,
    PUSH,
    REFUSED,
    RST,
    SETTINGS,
    SIZE_ERROR,
    WINDOW,
    Failure,
    frame,
    unpadded,
)

CONNECTION_WINDOW = 64 << 20
MAX_FRAME = 64 << 10
MAX_BLOCK = 32 << 10
MAX_STREAMS = 10_000
_CACHED_BLOCKS = 256


class Connection(asyncio.Protocol):
    """`calls` maps a path to what makes the handler of a call; others are answered with UNIMPLEMENTED.

    `everyone` holds all open connections. `broken` is told of an exception in a handler, whose call ends
    with INTERNAL.
    """

    def __init__(
        self,
        calls: dict[bytes, Callable[[Stream], Handler]],
        everyone: set[Connection] | None = None,
        broken: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.calls = calls
        self.broken = broken
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
            payload = unpadded(payload)
        if payload or not flags & END_STREAM:
            stream.received(payload, size)
        if flags & END_STREAM:
            stream.ended()

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        if number % 2 == 0:
            raise Failure(PROTOCOL_ERROR, "HEADERS on a stream of the server's")
        if flags & PADDED:
            payload = unpadded(payload)
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
            stream.handler = NOBODY
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
