"""Whatever bytes a client sends: an answer below 500 or a closed connection, never a hang."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from gateway_processes import Process, at_rest, call, chat, fake, running, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def gateway() -> Iterator[Process]:
    with running([fake()]) as process:
        yield process


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8),
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
            "tools",
            "cache_salt",
            "priority",
            "x",
        ]
    ),
    json_values,
    max_size=5,
)
bodies = st.one_of(fields.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))
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
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                answer += piece
        except (ConnectionError, BrokenPipeError):
            pass
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from([b"GET", b"POST", b"DELETE", b"HEAD", b"PUT", b"\x00"]), path=paths, body=bodies
)
def test_any_body_on_any_path(gateway: Process, method: bytes, path: bytes, body: bytes) -> None:
    head = b"%s %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (method, path, len(body))
    assert all(status < 500 for status in statuses(gateway.url, head + body))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(st.binary(max_size=200), st.lists(lines, max_size=5)), body=bodies)
def test_any_bytes_at_all(gateway: Process, raw: bytes | list[bytes], body: bytes) -> None:
    if isinstance(raw, list):
        raw = b"\r\n".join([b"POST /v1/chat/completions HTTP/1.1", *raw, b"", body])
    assert all(status < 500 for status in statuses(gateway.url, raw))


def test_afterwards_it_serves_as_before(gateway: Process) -> None:
    assert call(gateway.url, "/v1/chat/completions", chat())[0] == 200
    wait_for(lambda: at_rest(gateway.url))
    assert not [line for line in gateway.lines if "Traceback" in line], "no fault of its own was logged"
