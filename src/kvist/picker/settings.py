"""Everything an operator can set of the picker, with defaults and checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvist.gateway.settings import Settings
from kvist.picker.protocol import endpoint

# Settings of the gateway that mean nothing here: the data plane has the clients, and discovery the pool.
NOT_HERE = frozenset(
    {
        *("worker_urls", "workers", "port", "api_keys", "admin_key", "tls_cert", "tls_key", "log_requests"),
        *("prometheus_host", "prometheus_port", "max_header_size", "max_concurrent_requests"),
        *("rate_limit", "rate_burst", "connect_timeout", "first_byte_timeout", "request_timeout"),
        *("slow_client_timeout", "retry_max_retries", "service_discovery", "selector", "discovery_interval"),
        *("service_discovery_port", "service_discovery_namespace", "kubeconfig", "embedded", "profile"),
        *("eviction", "kv_tokens", "speed", "snapshot_index", "otlp_traces_endpoint"),
    }
)


class PickerSettings(Settings, kw_only=True, forbid_unknown_fields=True):
    """The gateway's settings of policies, knowledge, health and sharing, and the picker's own.

    Ports and names are those of the inference extension's reference picker. Times in seconds. The command
    line is made of the fields that have a description, less `NOT_HERE`.
    """

    endpoints: Annotated[list[str], Meta(description="Endpoints, each ip:port.")] = []
    pool_name: Annotated[str, Meta(description="InferencePool to find endpoints by, in Kubernetes.")] = ""
    pool_namespace: Annotated[str, Meta(description="Its namespace; also read from $NAMESPACE.")] = "default"
    pool_group: Annotated[str, Meta(description="Its API group.")] = "inference.networking.k8s.io"
    grpc_port: Annotated[int, Meta(description="Port of the ext_proc service, 0: any.")] = 9002
    grpc_health_port: Annotated[int, Meta(description="Port of gRPC health alone, 0: none.")] = 9003
    metrics_port: Annotated[int, Meta(description="Port of /metrics and /workers, 0: any.")] = 9090
    secure_serving: Annotated[bool, Meta(description="TLS, as most gateways expect.")] = False
    cert_path: Annotated[str, Meta(description="Folder with tls.crt and tls.key, else self-signed.")] = ""

    fallbacks: Annotated[int, Meta(description="Further endpoints to name, in order.")] = 2
    max_in_flight: Annotated[
        int, Meta(description="Requests for each ready endpoint at which the pool is saturated, 0: no bound.")
    ] = 0
    saturation_queue: Annotated[
        int, Meta(description="Requests waiting at an endpoint that saturate it; needs --metrics-interval.")
    ] = 5
    saturation_kv: Annotated[float, Meta(description="Share of its KV cache in use that does, likewise.")] = (
        0.8
    )
    objectives: Annotated[
        dict[str, int],
        Meta(description="Priority of an objective, NAME=PRIORITY; below 0: shed when saturated."),
    ] = {}
    drain_notice: Annotated[
        float, Meta(description="Seconds on SIGTERM in which the health check fails and all else goes on.")
    ] = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoints = list(dict.fromkeys(endpoint(text) for text in self.endpoints))
        for name in ("fallbacks", "max_in_flight", "drain_notice", "saturation_queue", "saturation_kv"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("grpc_port", "grpc_health_port", "metrics_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"{name} must lie between 0 and 65535, not {getattr(self, name)}")
        if self.endpoints and self.pool_name:
            raise ValueError("endpoints and pool_name exclude each other: give one of them")


def load(path: Path) -> dict[str, Any]:
    """The table [picker] of a TOML file, or its top level. Raises ValueError naming the file."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return {str(key).replace("-", "_"): value for key, value in data.get("picker", data).items()}


def build(values: dict[str, Any], where: str) -> PickerSettings:
    """Settings from plain values. Raises ValueError naming the field."""
    for name in sorted(NOT_HERE & set(values)):
        raise ValueError(f"{where}: {name} is a setting of kvist serve; the picker has no use for it")
    try:
        return msgspec.convert(values, PickerSettings)
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
