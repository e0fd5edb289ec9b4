"""The gRPC server against grpcio's client, and against bytes that are no HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("grpc")
pytest.importorskip("hpack")
pytest.importorskip("grpc_health")

import grpc
from gateway_processes import SECONDS
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_picker_core import make

from kvist.http.call import MAX_MESSAGE, Stream
from kvist.http.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST,
    SETTINGS,
    WINDOW,
    frame,
)
from kvist.http.grpc import Connection
from kvist.picker.protocol import SERVICE
from kvist.picker.server import Services


class Echo:
    """Sends every message back `times` times and ends with the peer."""

    times = 1
    seen: list[str] = []

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def message(self, data: bytes) -> None:
        for _ in range(Echo.times):
            self.stream.send(data)

    def half_closed(self) -> None:
        Echo.seen.append("half closed")
        self.stream.finish()

    def lost(self) -> None:
        Echo.seen.append("lost")


@contextlib.contextmanager
def served(make: Callable[[], asyncio.Protocol]) -> Iterator[tuple[int, asyncio.AbstractEventLoop]]:
    """A server in a thread of its own: its port and its loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(loop.create_server(make, "127.0.0.1", 0), loop).result(SECONDS)
    try:
        yield server.sockets[0].getsockname()[1], loop
    finally:

        async def stop() -> None:
            server.close()
            for task in asyncio.all_tasks(loop) - {asyncio.current_task(loop)}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), loop).result(SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(SECONDS)
        loop.close()


@pytest.fixture
def echo() -> Iterator[tuple[int, set[Connection]]]:
    Echo.times, Echo.seen = 1, []
    connections: set[Connection] = set()
    with served(lambda: Connection({b"/test/Echo": Echo}, connections)) as (port, _):
        yield port, connections


@pytest.fixture
def channel(echo: Any) -> Iterator[Any]:
    with grpc.insecure_channel(
        f"127.0.0.1:{echo[0]}", options=[("grpc.max_receive_message_length", -1)]
    ) as made:
        yield made


def bidi(channel: Any, path: str = "/test/Echo") -> Any:
    return channel.stream_stream(path, request_serializer=bytes, response_deserializer=bytes)


@pytest.mark.parametrize("sizes", [[0], [1, 0, 5], [100] * 50, [16_379, 16_384, 65_535, 65_536, 1 << 20]])
def test_messages_come_back_whole(channel: Any, sizes: list[int]) -> None:
    messages = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    assert list(bidi(channel)(iter(messages), timeout=SECONDS)) == messages


def test_many_calls_at_once(channel: Any) -> None:
    calls = [bidi(channel)(iter([b"%d" % i, b"x" * 3000]), timeout=SECONDS) for i in range(200)]
    for i, call in enumerate(calls):
        assert list(call) == [b"%d" % i, b"x" * 3000]


def test_an_unknown_method_and_an_oversized_message(channel: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        list(bidi(channel, "/test/Nothing")(iter([b"x"]), timeout=SECONDS))
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as error:
        list(bidi(channel)(iter([b"x" * (MAX_MESSAGE + 1)]), timeout=SECONDS))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert list(bidi(channel)(iter([b"still there"]), timeout=SECONDS)) == [b"still there"]


def test_a_cancelled_call_is_lost_once(channel: Any, echo: Any) -> None:
    wait = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b"x"
        wait.wait(SECONDS)

    call = bidi(channel)(messages(), timeout=SECONDS)
    assert next(call) == b"x"
    call.cancel()
    wait.set()
    until = time.monotonic() + SECONDS
    while Echo.seen != ["lost"]:
        assert time.monotonic() < until, Echo.seen
        time.sleep(0.01)
    (connection,) = echo[1]
    assert not connection.streams


def test_going_away_lets_calls_end(channel: Any, echo: Any) -> None:
    release = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b"first"
        release.wait(SECONDS)
        yield b"second"

    call = bidi(channel)(messages(), timeout=SECONDS)
    assert next(call) == b"first"
    (connection,) = echo[1]
    gone = threading.Event()

    def go() -> None:
        connection.go_away()
        gone.set()

    connection.transport._loop.call_soon_threadsafe(go)  # type: ignore[attr-defined]
    assert gone.wait(SECONDS)
    release.set()
    assert list(call) == [b"second"]
    until = time.monotonic() + SECONDS
    while connection in echo[1]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_handler_that_breaks_ends_its_own_call_only() -> None:
    class Broken(Echo):
        def message(self, data: bytes) -> None:
            if data == b"break":
                raise RuntimeError("a bug")
            super().message(data)

        def half_closed(self) -> None:
            if Echo.seen == ["break at the end"]:
                raise RuntimeError("another")
            super().half_closed()

    told: list[Exception] = []
    Echo.times, Echo.seen = 1, []
    with (
        served(lambda: Connection({b"/test/Echo": Broken}, None, told.append)) as (port, _),
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        with pytest.raises(grpc.RpcError) as error:
            list(bidi(channel)(iter([b"break"]), timeout=SECONDS))
        assert error.value.code() is grpc.StatusCode.INTERNAL
        assert [str(e) for e in told] == ["a bug"] and Echo.seen == ["lost"]
        Echo.seen = []
        assert list(bidi(channel)(iter([b"fine"]), timeout=SECONDS)) == [b"fine"]
        Echo.seen = ["break at the end"]
        with pytest.raises(grpc.RpcError) as error:
            list(bidi(channel)(iter([b"x"]), timeout=SECONDS))
        assert error.value.code() is grpc.StatusCode.INTERNAL


class Wire:
    """A connection fed by hand; what it writes is collected, in frames."""

    def __init__(self, calls: dict[bytes, Any] | None = None) -> None:
        self.closed = False
        self.data = b""
        self.connection = Connection(calls if calls is not None else {b"/test/Echo": Echo})
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        self.data += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def feed(self, data: bytes) -> None:
        if not self.closed:
            self.connection.data_received(data)

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """(kind, flags, stream, payload) written since the last call."""
        found, data = [], self.data
        while data:
            length = int.from_bytes(data[:3], "big")
            found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length]))
            data = data[9 + length :]
        self.data = b""
        return found


def call_headers(path: bytes = b"/test/Echo") -> bytes:
    from hpack import Encoder

    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode(
        [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
    )


def message(data: bytes) -> bytes:
    return b"\x00" + len(data).to_bytes(4, "big") + data


HELLO = PREFACE + frame(SETTINGS, 0, 0)


def test_a_reader_that_does_not_read_stops_the_sender() -> None:
    """What a stream owes stays within its own window and what was under way."""
    Echo.times = 1
    wire = Wire()
    wire.feed(HELLO + frame(HEADERS, END_HEADERS, 1, call_headers()))
    wire.frames()
    sent, window = 0, 256 << 10
    while window >= 16_000:
        wire.feed(frame(DATA, 0, 1, message(b"x" * 15_000)))
        sent, window = sent + 15_005, window - 15_005
        for kind, _, stream, payload in wire.frames():
            if kind == WINDOW and stream == 1:
                window += int.from_bytes(payload, "big")
        assert sent < 2 << 20
    owed = wire.connection.streams[1].owed
    assert 200_000 < owed <= sent
    got = 0
    for _ in range(200):
        wire.feed(
            frame(WINDOW, 0, 1, (65535).to_bytes(4, "big")) + frame(WINDOW, 0, 0, (65535).to_bytes(4, "big"))
        )
        got += sum(len(payload) for kind, _, _, payload in wire.frames() if kind == DATA)
    assert wire.connection.streams[1].owed == 0
    assert got + 65535 >= sent - 15_005


def test_a_transport_that_is_full_stops_the_sender_too() -> None:
    Echo.times = 1
    wire = Wire()
    wire.feed(HELLO + frame(HEADERS, END_HEADERS, 1, call_headers()))
    wire.frames()
    wire.connection.pause_writing()
    wire.feed(frame(DATA, 0, 1, message(b"x" * 100)))
    assert not [f for f in wire.frames() if f[0] == DATA]
    wire.connection.resume_writing()
    assert [f[3] for f in wire.frames() if f[0] == DATA] == [message(b"x" * 100)]


def test_a_call_in_one_segment_and_byte_by_byte() -> None:
    Echo.times = 1
    block = call_headers()
    data = (
        HELLO
        + frame(HEADERS, 0, 1, block[:3])
        + frame(9, END_HEADERS, 1, block[3:])
        + frame(DATA, 0, 1, message(b"ab")[:4])
        + frame(DATA, 8, 1, b"\x03" + message(b"ab")[4:] + b"\0\0\0")
        + frame(DATA, END_STREAM, 1)
        + frame(PING, 0, 0, b"12345678")
        + frame(SETTINGS, ACK, 0)
    )
    whole, slow = Wire(), Wire()
    whole.feed(data)
    for i in range(len(data)):
        slow.feed(data[i : i + 1])
    frames = whole.frames()
    assert frames == slow.frames()
    assert (PING, ACK, 0, b"12345678") in frames
    assert [p for kind, _, stream, p in frames if kind == DATA and stream == 1] == [message(b"ab")]
    trailers = [(flags, p) for kind, flags, stream, p in frames if kind == HEADERS and stream == 1][-1]
    assert trailers[0] & END_STREAM and b"grpc-status\x010" in trailers[1]
    assert not whole.connection.streams


def test_equal_blocks_are_known_again_once_the_peer_has_no_table() -> None:
    wire = Wire()
    wire.feed(HELLO + frame(SETTINGS, ACK, 0))
    for number in range(1, 9, 2):
        wire.feed(frame(HEADERS, END_HEADERS, number, call_headers()))
    assert len(wire.connection.streams) == 4
    assert list(wire.connection._paths.values()) == [b"/test/Echo"]


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        HELLO + (1 << 23).to_bytes(3, "big") + bytes(6),
        HELLO + frame(DATA, 0, 0, b"x"),
        HELLO + frame(DATA, 0, 7, b"x"),
        HELLO + frame(HEADERS, END_HEADERS, 2, call_headers()),
        HELLO + frame(HEADERS, 0, 1, b"") + frame(PING, 0, 0, bytes(8)),
        HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
        HELLO + frame(9, END_HEADERS, 1, b""),
        HELLO + frame(SETTINGS, 0, 0, b"12345"),
        HELLO + frame(WINDOW, 0, 0, bytes(4)),
        HELLO + frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff"),
        HELLO + frame(5, 0, 1, bytes(8)),
        HELLO + frame(HEADERS, END_HEADERS | 8, 1, b"\xff"),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(data: bytes) -> None:
    wire = Wire()
    wire.feed(data)
    kind, _, _, payload = wire.frames()[-1]
    assert wire.closed and kind == GOAWAY and payload[4:8] != bytes(4)


_KINDS = st.integers(0, 12)
_FRAMES = st.builds(
    frame, _KINDS, st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5]), st.binary(max_size=40)
)
_GOOD = st.sampled_from(
    [
        frame(HEADERS, END_HEADERS, 1, call_headers()),
        frame(HEADERS, END_HEADERS, 3, call_headers(b"/nothing")),
        frame(DATA, 0, 1, message(b"hello")),
        frame(DATA, END_STREAM, 1, message(b"")),
        frame(RST, 0, 1, bytes(4)),
        frame(WINDOW, 0, 1, (100).to_bytes(4, "big")),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(_FRAMES, _GOOD, st.binary(max_size=20)), max_size=15))
def test_no_bytes_raise_or_leave_a_call_behind(pieces: list[bytes]) -> None:
    Echo.times, Echo.seen = 1, []
    wire = Wire()
    wire.feed(HELLO)
    for data in pieces:
        wire.feed(data)
    wire.connection.connection_lost(None)
    assert not wire.connection.streams


def test_health_by_name_and_as_a_watch() -> None:
    picker, _ = make()
    services = Services(picker)
    with served(services.protocol) as (port, loop), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        ask = health_pb2.HealthCheckRequest
        states = health_pb2.HealthCheckResponse
        for name, status in (
            ("liveness", states.SERVING),
            ("readiness", states.NOT_SERVING),
            (SERVICE, states.NOT_SERVING),
        ):
            assert stub.Check(ask(service=name), timeout=SECONDS).status == status
        watch = stub.Watch(ask(service=SERVICE), timeout=SECONDS)
        assert next(watch).status == states.NOT_SERVING
        loop.call_soon_threadsafe(services.set_ready, True)
        assert next(watch).status == states.SERVING
        assert stub.Check(ask(service="inference-extension"), timeout=SECONDS).status == states.SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(ask(service="nobody"), timeout=SECONDS)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()


def test_a_malformed_message_ends_its_own_call_only() -> None:
    picker, _ = make()
    services = Services(picker)
    with served(services.protocol) as (port, _), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as error:
            list(bidi(channel, f"/{SERVICE}/Process")(iter([b"\xff\xff"]), timeout=SECONDS))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as error:
            list(bidi(channel, "/grpc.health.v1.Health/Check")(iter([b"\xff\xff"]), timeout=SECONDS))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not services.open
