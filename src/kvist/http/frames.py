"""Frames of HTTP/2 (RFC 9113): numbers, and the few bytes around each payload."""

from __future__ import annotations

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 1, 1, 4, 8, 32
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_ERROR, _, STREAM_CLOSED, SIZE_ERROR, REFUSED = range(8)
COMPRESSION_ERROR, CALM = 9, 11


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class Failure(Exception):
    """The connection cannot go on; `code` is the HTTP/2 error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def unpadded(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise Failure(PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
