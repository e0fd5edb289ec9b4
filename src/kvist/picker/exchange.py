"""One ext_proc stream: messages in, messages out, in the order that Envoy demands.

Request headers are held back until the body is whole, because the prompt decides. Then go, each once:
headers, body, trailers; the same for the answer, whose pieces are sent back as they come. No transport here:
`receive` takes one message and returns those to send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from kvist.gateway.usage import TAIL
from kvist.http.server import error_body
from kvist.picker import messages
from kvist.picker.core import Picker
from kvist.picker.flight import Asked, Flight, Refused
from kvist.picker.protocol import EXPLAIN, FAIRNESS, OBJECTIVE
from kvist.routing import Status

_GO_ON = {
    kind: messages.go_on(kind)
    for kind in ("request_trailers", "response_headers", "response_body", "response_trailers")
}
_NO_HEADERS = messages.go_on("request_headers")


class Exchange:
    """`ready` is called when a request that had to wait may go on: then `resume` returns what to send."""

    __slots__ = (
        "_chunks",
        "_duplex_in",
        "_duplex_out",
        "_ended",
        "_explain",
        "_headers",
        "_quiet",
        "_seen_data",
        "_size",
        "_subset",
        "_tail",
        "_trailers",
        "closed",
        "flight",
        "picker",
        "ready",
    )

    def __init__(self, picker: Picker, ready: Callable[[], None] = lambda: None) -> None:
        self.picker = picker
        self.ready = ready
        self.flight: Flight | None = None
        self.closed = False  # nothing more is to be sent
        self._headers: dict[str, str] = {}
        self._subset: frozenset[str] | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._trailers = False
        self._duplex_in = self._duplex_out = True
        self._quiet = False  # the data plane does not show the answer's body
        self._explain = False
        self._seen_data = False
        self._tail = b""
        self._ended = False

    def receive(self, data: bytes, now: float) -> list[bytes]:
        """Raises ValueError for a message that is none, or comes out of order."""
        try:
            request = messages.read(data)
        except DecodeError as error:
            raise ValueError(f"not a ProcessingRequest: {error}") from None
        kind = request.WhichOneof("request")
        if self.closed or kind is None:
            return []
        handle = getattr(self, f"_{kind}")
        found: list[bytes] = handle(getattr(request, kind), request, now)
        return found

    @property
    def waiting(self) -> bool:
        return self.flight is not None and self.flight.waiting

    # The request
    def _request_headers(self, part: Any, request: Any, now: float) -> list[bytes]:
        if self._headers:
            raise ValueError("request headers come twice")
        self._headers = messages.headers_of(part)
        self._subset = messages.subset_of(request)
        modes = request.protocol_config
        if request.HasField("protocol_config"):  # Envoy before 1.35 sends none: the protocol's mode is meant
            if modes.request_body_mode not in (messages.FULL_DUPLEX, messages.BUFFERED):
                raise ValueError("request_body_mode must be FULL_DUPLEX_STREAMED or BUFFERED")
            self._duplex_in = modes.request_body_mode == messages.FULL_DUPLEX
            self._duplex_out = modes.response_body_mode == messages.FULL_DUPLEX
            self._quiet = modes.response_body_mode == messages.NO_BODY
        self._explain = EXPLAIN in self._headers
        if part.end_of_stream:
            return self._ask(now)
        return [] if self._duplex_in else [_NO_HEADERS]

    def _request_body(self, part: Any, request: Any, now: float) -> list[bytes]:
        if self.flight is not None:
            raise ValueError("a request body goes on after its end")
        self._chunks.append(part.body)
        self._size += len(part.body)
        if self._size > self.picker.settings.max_payload_size:
            return self._refuse(Refused(413, "the request body is too large"))
        if part.end_of_stream:
            return self._ask(now)
        return []

    def _request_trailers(self, part: Any, request: Any, now: float) -> list[bytes]:
        if self.flight is not None:
            return [_GO_ON["request_trailers"]]
        self._trailers = True
        return self._ask(now)

    def _ask(self, now: float) -> list[bytes]:
        headers = self._headers
        asked = Asked(
            path=headers.get(":path", "").partition("?")[0],
            method=headers.get(":method", "POST"),
            body=b"".join(self._chunks),
            objective=headers.get(OBJECTIVE, ""),
            fairness=headers.get(FAIRNESS, ""),
            subset=self._subset,
        )
        try:
            self.flight = flight = self.picker.ask(asked, now)
        except Refused as refusal:
            return self._refuse(refusal)
        if flight.waiting:
            flight.settle = self.ready
            return []
        return self._placed(flight)

    def resume(self) -> list[bytes]:
        """What to send once `ready` was called."""
        flight = self.flight
        if self.closed or flight is None:
            return []
        return self._refuse(flight.refused) if flight.refused is not None else self._placed(flight)

    def _placed(self, flight: Flight) -> list[bytes]:
        if not self._duplex_in and self._chunks:  # Envoy has kept the body, and waits with it for this
            return [messages.destination(flight.places, "request_body")]
        out = [messages.destination(flight.places, "request_headers")]
        if self._size or self._chunks:
            out += messages.body("request_body", b"".join(self._chunks), not self._trailers)
        if self._trailers:
            out.append(_GO_ON["request_trailers"])
        self._chunks = []
        flight.asked.body = b""
        return out

    def _refuse(self, refusal: Refused) -> list[bytes]:
        headers = [("content-type", "application/json")]
        if refusal.retry_after:
            headers.append(("retry-after", str(refusal.retry_after)))
        text = error_body(
            refusal.status, refusal.message, "model_not_found" if refusal.status == 404 else None
        )
        self.closed = True
        self._chunks = []
        return [messages.refusal(refusal.status, text, headers)]

    # The answer
    def _response_headers(self, part: Any, request: Any, now: float) -> list[bytes]:
        flight = self.flight
        if flight is None or not flight.places:  # the data plane itself answers, before its request is whole
            return [_GO_ON["response_headers"]]
        status = next((h.raw_value for h in part.headers.headers if h.key == ":status"), b"")
        self.picker.answered(flight, int(status) if status.isdigit() else 0, messages.served_of(request), now)
        if part.end_of_stream:
            self._end(Status.OK, now)
        if not self._explain or flight.ticket is None:
            return [_GO_ON["response_headers"]]
        extra = [("x-kvist-worker", flight.ticket.worker.id)]
        if flight.ticket.decision.predicted is not None:
            extra.append(("x-kvist-predicted-latency", f"{flight.ticket.decision.predicted:.6f}"))
        return [messages.response_headers(extra)]

    def _response_body(self, part: Any, request: Any, now: float) -> list[bytes]:
        flight, data = self.flight, part.body
        if data:
            if not self._seen_data and flight is not None:
                self._seen_data = True
                self.picker.first_data(flight, now)
            if flight is not None and flight.stream:
                flight.events += data.count(b"data: ")
            self._tail = data[-TAIL:] if len(data) >= TAIL else (self._tail + data)[-TAIL:]
        if part.end_of_stream:
            self._end(Status.OK, now)
        if not self._duplex_out:
            return [_GO_ON["response_body"]]
        return list(messages.body("response_body", data, part.end_of_stream))

    def _response_trailers(self, part: Any, request: Any, now: float) -> list[bytes]:
        self._end(Status.OK, now)
        return [_GO_ON["response_trailers"]]

    # The end
    def close(self, now: float) -> None:
        """The stream is over. Before the end of the answer that means: the client left, or the endpoint
        broke off; the data plane does not say which. Further calls do nothing."""
        self.closed = True
        self._chunks = []
        whole = self._quiet and self.flight is not None and self.flight.status > 0
        self._end(Status.OK if whole else Status.CANCELLED, now)

    def _end(self, status: Status, now: float) -> None:
        if self._ended or self.flight is None:
            return
        self._ended = True
        self.picker.end(self.flight, status, self._tail, now)
