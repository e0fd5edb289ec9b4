"""Whatever bytes a client sends: an answer below 500 or a closed connection, never a hang."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from gateway_processes import (
    SECONDS,
    Process,
    call,
    chat,
    fake,
    metric,
    nothing_left,
    running,
    running_without_urls,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def gateway() -> Iterator[Process]:
    with running([fake()]) as process:
        yield process


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([1 << 40, 1 << 70, -(1 << 70), "\ud800", "x" * 5000])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.dictionaries(
    st.sampled_from(
        [
            "model",
            "messages",
            "prompt",
            "input",
            "stream",
            "max_tokens",
            "max_completion_tokens",
            "tools",
            "documents",
            "chat_template",
            "instructions",
            "text",
            "input_ids",
            "user",
            "cache_salt",
            "priority",
            "x",
        ]
    ),
    json_values,
    max_size=5,
)
bodies = st.one_of(
    fields.map(lambda value: json.dumps(value).encode()),
    fields.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.integers(0, 20_000).map(lambda depth: b'{"messages":' + b"[" * depth + b"]" * depth + b"}"),
    st.binary(max_size=60),
)
lines = st.one_of(
    st.sampled_from(
        [
            b"host: x",
            b"content-length: 5",
            b"content-length: -1",
            b"content-length: 99999999999999999999",
            b"transfer-encoding: chunked",
            b"connection: close",
            b"connection: upgrade",
            b"upgrade: websocket",
            b"expect: 100-continue",
            b"authorization: Bearer \xff",
            b"no colon",
            b"x: " + b"y" * 40_000,
        ]
    ),
    st.binary(max_size=30),
)
paths = st.sampled_from(
    b"/v1/chat/completions /v1/completions /v1/embeddings /v1/responses /generate /workers /policy "
    b"/v1/models / * // /%zz?a=b http://x/y".split()
)


def statuses(url: str, data: bytes) -> list[int]:
    """Send bytes, end the sending side, read to the end; TimeoutError if the gateway hangs."""
    host, port = url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                answer += piece
        except (ConnectionError, BrokenPipeError):
            pass
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from([b"GET", b"POST", b"DELETE", b"HEAD", b"PUT", b"\x00"]), path=paths, body=bodies
)
def test_any_body_on_any_path(gateway: Process, method: bytes, path: bytes, body: bytes) -> None:
    head = b"%s %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (method, path, len(body))
    assert all(status < 500 for status in statuses(gateway.url, head + body))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.one_of(st.binary(max_size=200), st.lists(lines, max_size=5)), body=bodies)
def test_any_bytes_at_all(gateway: Process, raw: bytes | list[bytes], body: bytes) -> None:
    if isinstance(raw, list):
        raw = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", *raw, b"", body])
    assert all(status < 500 for status in statuses(gateway.url, raw))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(["whole", "stream", "chunked", "bad", "absent"]), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 4000), max_size=8),
)
def test_pipelined_requests_in_any_pieces_are_answered_in_order(
    gateway: Process, kinds: list[str], cuts: list[int]
) -> None:
    data, expected = b"", []
    for i, kind in enumerate(kinds):
        body = json.dumps(chat(f"{i}" * 50, stream=kind == "stream")).encode()
        path = b"/nowhere" if kind == "absent" else b"/v1/chat/completions"
        last = b"connection: close\r\n" if i == len(kinds) - 1 else b""
        head = b"POST %s HTTP/1.1\r\nhost: x\r\n%s" % (path, last)
        if kind == "chunked":
            parts = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:7], body[7:]))
            data += head + b"transfer-encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"
        else:
            body = body[:-1] if kind == "bad" else body
            data += head + b"content-length: %d\r\n\r\n" % len(body) + body
        expected.append({"bad": 400, "absent": 404}.get(kind, 200))
    host, port = gateway.url.removeprefix("http://").split(":")
    answer, edges = b"", sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
        for start, end in pairwise(edges):
            sock.sendall(data[start:end])
        while piece := sock.recv(65536):
            answer += piece
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == expected


class Liar(threading.Thread):
    """A worker that answers every chat request with the bytes it is told, then closes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.answer = b""
        self.server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(5)
                try:
                    asked = sock.recv(65536)
                    known = asked.startswith(b"GET")
                    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}" if known else self.answer)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass
                except OSError:
                    pass


@pytest.fixture(scope="module")
def liar() -> Iterator[tuple[Liar, Process]]:
    worker = Liar()
    worker.start()
    options = ("--cb-failure-threshold=1000000", "--first-byte-timeout=4", "--log-requests")
    with running_without_urls([], f"--worker-urls={worker.url}", *options) as process:
        yield worker, process
    worker.server.close()


answers = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda status, headers, body: b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body]),
        st.sampled_from([b"200 OK", b"100 Continue", b"204 No Content", b"304 x", b"500 x", b"999 x", b"x"]),
        st.lists(
            st.sampled_from(
                [
                    b"content-length: 5",
                    b"content-length: 0",
                    b"content-length: -3",
                    b"content-length: 99999999",
                    b"transfer-encoding: chunked",
                    b"transfer-encoding: gzip, chunked",
                    b"connection: close",
                    b"connection: upgrade",
                    b"upgrade: x",
                    b"x: " + b"y" * 70_000,
                    b"x: a\rb",
                    b": nameless",
                ]
            )
            | st.binary(max_size=10),
            max_size=4,
        ),
        st.sampled_from(
            [b"", b"hello", b"hello, more than five", b"5\r\nhello\r\n0\r\n\r\n", b"5\r\nhel", b"\xff"]
        )
        | st.binary(max_size=30),
    ),
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(answer=answers, stream=st.booleans())
def test_any_answer_of_a_worker(liar: tuple[Liar, Process], answer: bytes, stream: bool) -> None:
    """It is passed on, answered 502 or cut; it never breaks the gateway or hangs the client."""
    worker, gateway = liar
    worker.answer = answer
    body = json.dumps(chat(stream=stream)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as sock:
        sock.sendall(head % len(body) + body)
        try:
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass


def test_after_lies_nothing_is_left(liar: tuple[Liar, Process]) -> None:
    _, gateway = liar
    nothing_left(gateway)
    assert metric(gateway.url, "kvist_worker_upstream_connections") == 0
    assert not [line for line in gateway.lines if "Traceback" in line or "error while" in line]


def test_afterwards_it_serves_as_before(gateway: Process) -> None:
    assert call(gateway.url, "/v1/chat/completions", chat())[0] == 200
    nothing_left(gateway)
    assert not [line for line in gateway.lines if "Traceback" in line], "no fault of its own was logged"
