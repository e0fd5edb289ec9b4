"""What the custom resources in deploy/ must look like: JSON Schemas in our own words, for the fields we use.

Written after the published definitions (InferencePool v1 and InferenceObjective v1alpha2 of the Gateway API
Inference Extension, Gateway and HTTPRoute v1 of the Gateway API). Stricter than those in one point: a field
that is not listed here is an error, so that a misspelt one is found.
"""

from __future__ import annotations

from typing import Any

NAME = {"type": "string", "minLength": 1, "maxLength": 253}
LABEL = {"type": "string", "maxLength": 63, "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
GROUP = {"type": "string", "pattern": r"^$|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"}
KIND = {"type": "string", "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}


def shape(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others; `required` is a list of names in one string."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict[str, Any], least: int = 0, most: int = 64) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


SPECS: dict[tuple[str, str], dict[str, Any]] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): shape(
        "selector targetPorts endpointPickerRef",
        selector=shape(
            "matchLabels",
            matchLabels={"type": "object", "minProperties": 1, "additionalProperties": LABEL},
        ),
        targetPorts=many(shape("number", number=PORT), 1, 8),
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=shape(
            "name port",  # the port is required for a Service
            group=GROUP,
            kind=KIND,
            name=NAME,
            port=shape("number", number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
    ("inference.networking.x-k8s.io/v1alpha2", "InferenceObjective"): shape(
        "poolRef",
        priority={"type": "integer"},
        poolRef=shape("name", group=GROUP, kind=KIND, name=NAME),
    ),
    ("gateway.networking.k8s.io/v1", "Gateway"): shape(
        "gatewayClassName listeners",
        gatewayClassName=NAME,
        listeners=many(shape("name port protocol", name=NAME, port=PORT, protocol={"type": "string"}), 1),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): shape(
        "",
        parentRefs=many(shape("name", group=GROUP, kind=KIND, name=NAME, namespace=NAME), 0, 32),
        rules=many(
            shape(
                "",
                matches=many(
                    shape(
                        "",
                        path=shape(
                            "",
                            type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                            value={"type": "string", "maxLength": 1024, "pattern": "^/"},
                        ),
                    )
                ),
                backendRefs=many(
                    shape("name", group=GROUP, kind=KIND, name=NAME, port=PORT, weight={"type": "integer"}),
                    0,
                    16,
                ),
                timeouts=shape("", request=DURATION, backendRequest=DURATION),
            ),
            1,
            16,
        ),
    ),
    ("networking.istio.io/v1", "DestinationRule"): shape(
        "host",
        host=NAME,
        trafficPolicy=shape(
            "",
            tls=shape(
                "mode",
                mode={"enum": ["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]},
                insecureSkipVerify={"type": "boolean"},
            ),
        ),
    ),
}


def schema(version: str, kind: str) -> dict[str, Any]:
    """Raises KeyError for a kind that is not described here."""
    return shape(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=shape("name", name=NAME, labels={"type": "object"}, namespace=NAME),
        spec=SPECS[version, kind],
    )
