"""Envoy's bootstrap for a picker in front of a fixed list of endpoints, as gateways generate it for a pool.

The cluster balances by `override_host`: it goes where the picker's metadata (or header) says, down the list
on retries, and by round robin where nobody says anything. That is what failing open falls back on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvist.picker.protocol import DESTINATION, DESTINATION_SPACE, SERVED, SERVICE, SUBSET_SPACE

_EXTENSIONS = "type.googleapis.com/envoy.extensions."
_PLENTY = {
    "thresholds": [
        {
            "max_connections": 40_000,
            "max_pending_requests": 40_000,
            "max_requests": 40_000,
            "max_retries": 1024,
        }
    ]
}


def bootstrap(
    endpoints: Sequence[str],
    *,
    port: int,
    picker: str | None,
    host: str = "127.0.0.1",
    admin_port: int = 0,
    fail_open: bool = False,
    secure: bool = False,
    retries: int = 2,
    observe_body: bool = True,
    health_path: str = "/health",
    health_seconds: float = 1.0,
) -> dict[str, Any]:
    """The bootstrap as plain data (Envoy reads JSON): listen on `host:port`, ask the picker at `picker`
    (`ip:port`; None: plain round robin), serve from `endpoints`.

    fail_open: without a picker go on by round robin; else answer 503. secure: TLS to the picker.
    observe_body: show the picker the answers' bodies (exact token counts and times to first token) rather
    than only their heads and ends.
    """
    filters = [] if picker is None else [_ext_proc(fail_open, observe_body)]
    clusters = [_pool(endpoints, health_path, health_seconds)]
    if picker is not None:
        clusters.append(_picker(picker, secure, health_seconds))
    manager = {
        "@type": _EXTENSIONS + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "kvist",
        "http_filters": [
            *filters,
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": _EXTENSIONS + "filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            },
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "pool",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": _route(retries)}],
                }
            ]
        },
    }
    listener = {
        "name": "pool",
        "address": _address(f"{host}:{port}"),
        "per_connection_buffer_limit_bytes": 1 << 20,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": _address(f"127.0.0.1:{admin_port}")},
        "static_resources": {"listeners": [listener], "clusters": clusters},
    }


def _route(retries: int) -> dict[str, Any]:
    """No timeouts: an answer may stream for long. Retried is what the client has seen nothing of yet."""
    return {
        "cluster": "pool",
        "timeout": "0s",
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset",
            "num_retries": retries,
            "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
        },
    }


def _ext_proc(fail_open: bool, observe_body: bool) -> dict[str, Any]:
    space = {"untyped": [DESTINATION_SPACE, SUBSET_SPACE]}
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": _EXTENSIONS + "filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
            "failure_mode_allow": fail_open,
            "status_on_error": {"code": "ServiceUnavailable"},
            "message_timeout": "10s",
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "FULL_DUPLEX_STREAMED",
                "request_trailer_mode": "SEND",
                "response_header_mode": "SEND",
                "response_body_mode": "FULL_DUPLEX_STREAMED" if observe_body else "NONE",
                "response_trailer_mode": "SEND" if observe_body else "SKIP",
            },
            "metadata_options": {"forwarding_namespaces": space, "receiving_namespaces": space},
        },
    }


def _pool(endpoints: Sequence[str], health_path: str, seconds: float) -> dict[str, Any]:
    override = {
        "@type": _EXTENSIONS + "load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [
            {"metadata": {"key": DESTINATION_SPACE, "path": [{"key": DESTINATION}]}},
            {"header": DESTINATION},
        ],
        "selected_host_key": {"key": DESTINATION_SPACE, "path": [{"key": SERVED}]},
        "fallback_policy": {"policies": [_policy("round_robin", "RoundRobin")]},
    }
    return {
        "name": "pool",
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": _PLENTY,
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "override_host", "typed_config": override}}]
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": f"{seconds}s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "http_health_check": {"path": health_path},
            }
        ],
        "load_assignment": _load("pool", endpoints),
    }


def _policy(name: str, message: str) -> dict[str, Any]:
    kind = f"{_EXTENSIONS}load_balancing_policies.{name}.v3.{message}"
    return {"typed_extension_config": {"name": name, "typed_config": {"@type": kind}}}


def _picker(picker: str, secure: bool, seconds: float) -> dict[str, Any]:
    """Health checks make failing open work: in full-duplex mode Envoy can go on without the picker only if it
    knows before the first piece of a body was sent to it that nobody is there. Pings end what a picker that
    hangs holds up; one that drains answers them."""
    cluster = {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": _PLENTY,
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _EXTENSIONS + "upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "max_concurrent_streams": 4096,
                        "connection_keepalive": {"interval": f"{5 * seconds}s", "timeout": f"{5 * seconds}s"},
                    }
                },
            }
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": f"{seconds}s",
                "no_traffic_interval": f"{seconds}s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": SERVICE},
            }
        ],
        "load_assignment": _load("picker", [picker]),
    }
    if secure:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": _EXTENSIONS + "transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": {"alpn_protocols": ["h2"]},
            },
        }
    return cluster


def _load(name: str, endpoints: Sequence[str]) -> dict[str, Any]:
    hosts = [{"endpoint": {"address": _address(endpoint)}} for endpoint in endpoints]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}


def _address(endpoint: str) -> dict[str, Any]:
    host, _, port = endpoint.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}
