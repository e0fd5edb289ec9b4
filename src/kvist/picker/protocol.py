"""Names and formats of the endpoint-picker protocol, version 1.0.

Source: Kubernetes Gateway API Inference Extension, docs/proposals/004-endpoint-picker-protocol, and the
header names of its reference endpoint picker.
"""

from __future__ import annotations

from collections.abc import Iterable

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

DESTINATION = "x-gateway-destination-endpoint"  # header and metadata key: ip:port[,ip:port…]
DESTINATION_SPACE = "envoy.lb"
SERVED = "x-gateway-destination-endpoint-served"  # metadata key, from the data plane
SUBSET = "x-gateway-destination-endpoint-subset"  # metadata key, from the data plane
SUBSET_SPACE = "envoy.lb.subset_hint"
OBJECTIVE = "x-gateway-inference-objective"  # name of an InferenceObjective, which has the priority
FAIRNESS = "x-gateway-inference-fairness-id"  # whose request it is; flows of one priority share evenly
EXPLAIN = "x-kvist-explain"  # kvist's own: name worker and predicted latency in the answer's headers

CHUNK = 62_000  # bytes of a body message to the data plane; some take at most 64 KiB


def endpoint(text: str) -> str:
    """A checked `ip:port` or `[v6]:port`. Raises ValueError."""
    host, colon, port = text.strip().rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"endpoint {text!r} must look like 10.0.0.1:8000")
    if ":" in bare and bare == host:
        raise ValueError(f"endpoint {text!r}: write an IPv6 address as [{host}]:{port}")
    return f"{host}:{port}"


def subset(values: Iterable[str]) -> frozenset[str]:
    """Endpoints of a subset hint: items, each of which may join several with commas; a bare IP stands for
    all its ports."""
    return frozenset(part.strip() for value in values for part in value.split(",") if part.strip())


def url_of(place: str) -> str:
    """What the router and the fleet call an endpoint."""
    return f"http://{place}"


def place_of(url: str) -> str:
    return url.removeprefix("http://")


def in_subset(place: str, wanted: frozenset[str]) -> bool:
    """Whether an endpoint is named by a subset hint."""
    return place in wanted or place.rpartition(":")[0].strip("[]") in wanted
