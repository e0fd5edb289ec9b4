"""Everything an operator can set of the picker, with defaults and checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

from kvist.gateway.settings import Settings
from kvist.picker.protocol import endpoint


class PickerSettings(Settings, kw_only=True, forbid_unknown_fields=True):
    """The gateway's settings of policies, workers' health and breakers, and the picker's own.

    Ports and names are those of the inference extension's reference picker. Times in seconds.
    """

    endpoints: list[str] = []  # ip:port; else discovered in Kubernetes
    pool_name: str = ""
    pool_namespace: str = "default"
    pool_group: str = "inference.networking.k8s.io"
    grpc_port: int = 9002
    grpc_health_port: int = 9003  # 0: only on grpc_port
    metrics_port: int = 9090
    secure_serving: bool = False
    cert_path: str = ""  # folder with tls.crt and tls.key; empty: self-signed

    fallbacks: int = 2  # further endpoints that the data plane may try, in order
    max_in_flight: int = 0  # requests under way at one endpoint before the pool is saturated; 0: no bound
    drain_notice: float = 3.0  # what a data plane gets to see the health check fail, on SIGTERM
    objectives: dict[str, int] = {}  # priority by objective name; below 0: shed when saturated

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoints = list(dict.fromkeys(endpoint(text) for text in self.endpoints))
        for name in ("fallbacks", "max_in_flight", "drain_notice"):
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
    try:
        return msgspec.convert(values, PickerSettings)
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
