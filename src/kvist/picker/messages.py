"""Messages of `envoy.service.ext_proc.v3`, read and made. Answers are serialized once here.

In FULL_DUPLEX_STREAMED mode the picker sends every byte of a body back; in the other modes it says go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

from kvist.picker.protocol import (
    CHUNK,
    DESTINATION,
    DESTINATION_SPACE,
    SERVED,
    SUBSET,
    SUBSET_SPACE,
    subset,
)

FULL_DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED = ProcessingMode.BUFFERED
NO_BODY = ProcessingMode.NONE
_ATTRIBUTES = "envoy.filters.http.ext_proc"

read = ProcessingRequest.FromString


def headers_of(headers: Any) -> dict[str, str]:
    """Headers by lower-case name; of a repeated one the last."""
    return {h.key: (h.raw_value or h.value.encode()).decode("latin-1") for h in headers.headers.headers}


def subset_of(request: Any) -> frozenset[str] | None:
    """The endpoints to choose from, None if the data plane names none."""
    space = request.metadata_context.filter_metadata
    if SUBSET_SPACE not in space or SUBSET not in space[SUBSET_SPACE].fields:
        return None
    value = space[SUBSET_SPACE].fields[SUBSET]
    if value.HasField("list_value"):
        return subset(item.string_value for item in value.list_value.values)
    return subset([value.string_value])


def served_of(request: Any) -> str:
    """The endpoint that answered, "" if the data plane does not say.

    The protocol has it in metadata; Envoy can also send it as the attribute `upstream.address`.
    """
    space = request.metadata_context.filter_metadata
    if DESTINATION_SPACE in space and SERVED in space[DESTINATION_SPACE].fields:
        return str(space[DESTINATION_SPACE].fields[SERVED].string_value)
    if _ATTRIBUTES in request.attributes:
        return str(request.attributes[_ATTRIBUTES].fields["upstream.address"].string_value)
    return ""


def destination(places: Iterable[str], kind: str) -> bytes:
    """The answer to the request's headers or buffered body: where to go, as header and as metadata."""
    value = ",".join(places)
    response = ProcessingResponse()
    common = getattr(response, kind).response
    common.clear_route_cache = True
    _set(common.header_mutation, DESTINATION, value)
    space = response.dynamic_metadata.fields[DESTINATION_SPACE].struct_value
    space.fields[DESTINATION].string_value = value
    return bytes(response.SerializeToString())


def response_headers(extra: Iterable[tuple[str, str]] = ()) -> bytes:
    """The answer to the response headers: go on, with `extra` headers."""
    response = ProcessingResponse()
    response.response_headers.SetInParent()
    for name, value in extra:
        _set(response.response_headers.response.header_mutation, name, value)
    return bytes(response.SerializeToString())


def go_on(kind: str) -> bytes:
    """An answer without a change to a message of `kind` (request_body, response_trailers, …)."""
    response = ProcessingResponse()
    getattr(response, kind).SetInParent()
    return bytes(response.SerializeToString())


def body(kind: str, data: bytes, last: bool) -> Iterator[bytes]:
    """`data` sent back whole; `last`: the body ends with it."""
    if not data and last:  # how nearly every body ends
        yield _LAST[kind]
        return
    for at in range(0, len(data) or 1, CHUNK):
        response = ProcessingResponse()
        streamed = getattr(response, kind).response.body_mutation.streamed_response
        streamed.body = data[at : at + CHUNK]
        streamed.end_of_stream = last and at + CHUNK >= len(data)
        yield response.SerializeToString()


def refusal(status: int, text: bytes, headers: Iterable[tuple[str, str]]) -> bytes:
    """Answer the client at once."""
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = status
    immediate.body = text
    immediate.details = "kvist_picker"
    for name, value in headers:
        _set(immediate.headers, name, value)
    return bytes(response.SerializeToString())


def _set(mutation: Any, name: str, value: str) -> None:
    option = mutation.set_headers.add()
    option.header.key = name
    option.header.raw_value = value.encode("latin-1")
    option.append_action = option.OVERWRITE_IF_EXISTS_OR_ADD


def _last(kind: str) -> bytes:
    response = ProcessingResponse()
    getattr(response, kind).response.body_mutation.streamed_response.end_of_stream = True
    return bytes(response.SerializeToString())


_LAST = {kind: _last(kind) for kind in ("request_body", "response_body")}
