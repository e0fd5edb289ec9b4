"""Ext_proc streams without a transport: order, bytes and reservations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("envoy.service.ext_proc.v3")

from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest as Request
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingResponse as Response
from test_picker_core import Pool, chat, make

from kvist.picker.core import Picker
from kvist.picker.exchange import Exchange

FULL, BUFFERED, NONE = 4, 2, 0


def headers(
    path: str = "/v1/chat/completions", *, end: bool = False, modes: Any = (FULL, FULL), **more: str
) -> bytes:
    request = Request()
    for name, value in {":path": path, ":method": "GET" if end else "POST", **more}.items():
        request.request_headers.headers.headers.add(key=name.replace("_", "-"), raw_value=value.encode())
    request.request_headers.end_of_stream = end
    if modes is not None:
        request.protocol_config.request_body_mode, request.protocol_config.response_body_mode = modes
    return request.SerializeToString()


def piece(kind: str, data: bytes = b"", end: bool = False) -> bytes:
    request = Request()
    part = getattr(request, kind)
    part.SetInParent()
    if kind.endswith("_body"):
        part.body, part.end_of_stream = data, end
    return request.SerializeToString()


def answer(status: int = 200, served: str = "", end: bool = False) -> bytes:
    request = Request()
    request.response_headers.headers.headers.add(key=":status", raw_value=str(status).encode())
    request.response_headers.end_of_stream = end
    if served:
        space = request.metadata_context.filter_metadata["envoy.lb"]
        space.fields["x-gateway-destination-endpoint-served"].string_value = served
    return request.SerializeToString()


def kinds(out: list[bytes]) -> list[str]:
    return [Response.FromString(data).WhichOneof("response") for data in out]


def sent_back(out: list[bytes], kind: str) -> tuple[bytes, list[bool]]:
    """The body that was sent back, and the end-of-stream marks of its pieces."""
    parts = [Response.FromString(data) for data in out]
    bodies = [getattr(p, kind).response.body_mutation.streamed_response for p in parts if p.HasField(kind)]
    assert all(len(body.body) <= 62_000 for body in bodies)
    return b"".join(body.body for body in bodies), [body.end_of_stream for body in bodies]


def place(out: list[bytes], kind: str = "request_headers") -> str:
    """The destination, which header and metadata must agree on."""
    response = Response.FromString(out[0])
    common = getattr(response, kind).response
    (option,) = common.header_mutation.set_headers
    assert option.header.key == "x-gateway-destination-endpoint" and common.clear_route_cache
    value = response.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-gateway-destination-endpoint"]
    assert value.string_value == option.header.raw_value.decode()
    return value.string_value


def start(**options: object) -> tuple[Exchange, Picker, Pool]:
    picker, pool = make(3, **options)  # type: ignore[arg-type]
    return Exchange(picker), picker, pool


def test_a_whole_life_in_full_duplex() -> None:
    exchange, picker, pool = start()
    assert exchange.receive(headers(), 0.0) == []
    body = chat("hello", ',"stream":true')
    assert exchange.receive(piece("request_body", body[:10]), 0.0) == []
    out = exchange.receive(piece("request_body", body[10:], end=True), 0.0)
    assert kinds(out) == ["request_headers", "request_body"]
    assert sent_back(out, "request_body") == (body, [True])
    places = place(out).split(",")
    assert len(places) == 3 and set(places) == set(pool.places)
    assert kinds(exchange.receive(answer(served=places[0]), 0.2)) == ["response_headers"]
    for end in (False, True):
        out = exchange.receive(piece("response_body", b"data: x\n\n", end), 0.3)
        assert sent_back(out, "response_body") == (b"data: x\n\n", [end])
    assert pool.at_rest()
    own = picker.metrics.worker(f"http://{places[0]}")
    assert own.outcomes == {"ok": 1} and own.ttft.total == pytest.approx(0.3)
    exchange.close(1.0)
    assert own.outcomes == {"ok": 1}


def test_request_trailers_end_the_body() -> None:
    exchange, _, _ = start()
    exchange.receive(headers(), 0.0)
    assert exchange.receive(piece("request_body", chat("x")), 0.0) == []
    out = exchange.receive(piece("request_trailers"), 0.0)
    assert kinds(out) == ["request_headers", "request_body", "request_trailers"]
    assert sent_back(out, "request_body") == (chat("x"), [False])


def test_response_trailers_end_the_answer() -> None:
    exchange, _, pool = start()
    exchange.receive(headers(), 0.0)
    exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
    exchange.receive(answer(), 0.1)
    out = exchange.receive(piece("response_body", b"abc"), 0.1)
    assert sent_back(out, "response_body") == (b"abc", [False])
    assert kinds(exchange.receive(piece("response_trailers"), 0.2)) == ["response_trailers"]
    assert pool.at_rest()


def test_no_body_is_placed_at_once() -> None:
    exchange, _, pool = start()
    out = exchange.receive(headers("/v1/models?x=1", end=True), 0.0)
    assert kinds(out) == ["request_headers"] and place(out).split(",")[0] in pool.places


def test_envoy_may_keep_the_body_itself() -> None:
    exchange, _, pool = start()
    assert kinds(exchange.receive(headers(modes=(BUFFERED, NONE)), 0.0)) == ["request_headers"]
    out = exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
    assert kinds(out) == ["request_body"]
    assert place(out, "request_body").split(",")[0] in pool.places
    assert kinds(exchange.receive(answer(), 0.1)) == ["response_headers"]
    exchange.close(0.5)  # with no body shown, the end of the stream is the end of the answer
    assert pool.at_rest()
    assert sum(own.outcomes["ok"] for own in exchange.picker.metrics.workers.values()) == 1


def test_streamed_request_bodies_cannot_be_routed_by_their_prompt() -> None:
    exchange, _, _ = start()
    with pytest.raises(ValueError, match="request_body_mode"):
        exchange.receive(headers(modes=(1, FULL)), 0.0)


@pytest.mark.parametrize("as_list", [True, False])
def test_the_subset_hint_is_kept_to(as_list: bool) -> None:
    picker, pool = make(4)
    for wanted, status in ((pool.places[1:3], None), ([], 503), (["10.9.9.9:1"], 503)):
        exchange = Exchange(picker)
        request = Request.FromString(headers())
        field = request.metadata_context.filter_metadata["envoy.lb.subset_hint"].fields[
            "x-gateway-destination-endpoint-subset"
        ]
        if as_list:
            field.list_value.SetInParent()
            for text in wanted:
                field.list_value.values.add(string_value=text)
        else:
            field.string_value = ",".join(wanted)
        exchange.receive(request.SerializeToString(), 0.0)
        out = exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
        if status is None:
            assert set(place(out).split(",")) == set(wanted)
        else:
            assert Response.FromString(out[0]).immediate_response.status.code == status


def test_refusals_are_json_with_retry_after() -> None:
    exchange, picker, _ = start(max_in_flight=1, objectives={"batch": -1})
    for n in range(3):
        other = Exchange(picker)
        other.receive(headers(), 0.0)
        other.receive(piece("request_body", chat(str(n)), end=True), 0.0)
    exchange.receive(headers(x_gateway_inference_objective="batch"), 0.0)
    (out,) = exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
    immediate = Response.FromString(out).immediate_response
    assert immediate.status.code == 429 and b'"error"' in immediate.body and exchange.closed
    found = {o.header.key: o.header.raw_value for o in immediate.headers.set_headers}
    assert found == {"content-type": b"application/json", "retry-after": b"1"}
    assert exchange.receive(piece("request_body", b"late", end=True), 0.0) == []


def test_a_body_that_is_too_large_is_413() -> None:
    exchange, _, _ = start(max_payload_size=100)
    exchange.receive(headers(), 0.0)
    (out,) = exchange.receive(piece("request_body", b"x" * 101), 0.0)
    assert Response.FromString(out).immediate_response.status.code == 413


def test_a_client_that_leaves_gives_the_reservation_back() -> None:
    for until in range(5):
        exchange, picker, pool = start()
        steps = [
            headers(),
            piece("request_body", chat("x"), end=True),
            answer(),
            piece("response_body", b"part"),
        ]
        for step in steps[:until]:
            exchange.receive(step, 0.0)
        exchange.close(1.0)
        exchange.close(2.0)
        assert pool.at_rest() and picker.admission.active == 0
        assert sum(own.outcomes["cancelled"] for own in picker.metrics.workers.values()) == (until >= 2)


def test_a_waiting_request_goes_on_by_resume() -> None:
    picker, pool = make(1, max_in_flight=1)
    first, turns = Exchange(picker), []
    second = Exchange(picker, lambda: turns.append(1))
    for exchange in (first, second):
        exchange.receive(headers(), 0.0)
        out = exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
    assert out == [] and second.waiting
    first.close(1.0)
    assert turns == [1]
    assert kinds(second.resume()) == ["request_headers", "request_body"]
    second.close(2.0)
    assert pool.at_rest() and picker.admission.active == 0


def test_explained_on_request() -> None:
    exchange, _, pool = start()
    exchange.receive(headers(x_kvist_explain="1"), 0.0)
    exchange.receive(piece("request_body", chat("x"), end=True), 0.0)
    (out,) = exchange.receive(answer(), 0.1)
    found = {
        o.header.key: o.header.raw_value.decode()
        for o in Response.FromString(out).response_headers.response.header_mutation.set_headers
    }
    assert found["x-kvist-worker"].removeprefix("http://") in pool.places
    assert float(found["x-kvist-predicted-latency"]) >= 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_byte_comes_back_in_order(data: st.DataObject) -> None:
    """However bodies are cut into messages, of up to 200 kB."""
    size = data.draw(st.sampled_from([0, 1, 61_999, 62_000, 62_001, 200_000]))
    body = chat("y" * size)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=5)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    apart = data.draw(st.booleans())  # Envoy may mark the end in an empty message of its own
    exchange, _, pool = start()
    out = exchange.receive(headers(), 0.0)
    for i, part in enumerate(pieces):
        out += exchange.receive(piece("request_body", part, end=i == len(pieces) - 1 and not apart), 0.0)
    if apart:
        out += exchange.receive(piece("request_body", b"", end=True), 0.0)
    found, ends = sent_back(out, "request_body")
    assert found == body and ends[-1] and not any(ends[:-1])
    out = exchange.receive(answer(), 0.0)
    for i, part in enumerate(pieces):
        out += exchange.receive(piece("response_body", part, end=i == len(pieces) - 1), 0.0)
    found, ends = sent_back(out, "response_body")
    assert found == body and ends[-1] and not any(ends[:-1])
    assert pool.at_rest()


STEPS = [
    headers(),
    headers(end=True),
    headers("/v1/completions", modes=None),
    piece("request_body", chat("x"), end=True),
    piece("request_body", b'{"model"'),
    piece("request_body", b"", end=True),
    piece("request_trailers"),
    answer(),
    answer(503, end=True),
    answer(200, "10.0.0.2:8000"),
    piece("response_body", b"x"),
    piece("response_body", b"", end=True),
    piece("response_trailers"),
    b"",
    b"\xff\xff\xff",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=12))
def test_messages_in_any_order_break_nothing(steps: list[bytes]) -> None:
    exchange, picker, pool = start(max_in_flight=1)
    for step in steps:
        try:
            exchange.receive(step, 0.0)
        except ValueError:
            break
    exchange.close(1.0)
    assert pool.at_rest() and picker.admission.active == picker.admission.waiting == 0
