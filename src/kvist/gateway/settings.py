"""Everything an operator can set, with defaults and checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec

# Paths that are routed by prompt; the value names the kind of body (see prompt.py).
ROUTED = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/tokenize": "any",
    "/tokenize": "any",
    "/generate": "generate",
}


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Names follow the SGLang lineage where it has one. Times in seconds. Raises ValueError."""

    worker_urls: list[str] = []
    policy: str = "lbgr"
    policy_params: dict[str, Any] = {}
    host: str = "127.0.0.1"
    port: int = 8000
    seed: int = 0

    api_keys: list[str] = []  # sha256:<hex> or plain; empty: open
    admin_key: str = ""
    worker_api_key: str = ""  # sent to the workers instead of the client's

    max_payload_size: int = 32 << 20
    max_header_size: int = 32 << 10
    max_concurrent_requests: int = 4096
    queue_size: int = 1024
    queue_timeout: float = 60.0
    rate_limit: float = 0.0  # requests/s of one key, 0: none
    rate_burst: int = 0  # 0: one second's worth

    connect_timeout: float = 5.0
    first_byte_timeout: float = 300.0
    request_timeout: float = 1800.0
    slow_client_timeout: float = 60.0
    retry_max_retries: int = 2
    cb_failure_threshold: int = 5
    cb_timeout_duration: float = 30.0
    health_check_interval: float = 10.0
    health_check_timeout: float = 5.0
    health_check_endpoint: str = "/health"
    health_failure_threshold: int = 3
    health_success_threshold: int = 1
    drain_timeout: float = 30.0

    index_tokens: int = 4_000_000  # a worker's prefixes that the index remembers
    allow_paths: list[str] = []  # further worker paths that are passed on
    snapshot: str = ""
    snapshot_interval: float = 60.0
    log_requests: bool = False
    tls_cert: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        for name in ("max_payload_size", "max_header_size", "max_concurrent_requests", "index_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("queue_size", "retry_max_retries", "rate_limit", "rate_burst"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in (
            "connect_timeout",
            "first_byte_timeout",
            "request_timeout",
            "slow_client_timeout",
            "health_check_interval",
            "health_check_timeout",
            "cb_timeout_duration",
            "queue_timeout",
            "snapshot_interval",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        for name in ("cb_failure_threshold", "health_failure_threshold", "health_success_threshold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie between 0 and 65535, not {self.port}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        for path in self.allow_paths:
            if not path.startswith("/"):
                raise ValueError(f"allow_paths: {path!r} must start with /")


def load_settings(path: Path) -> dict[str, Any]:
    """The table [serve] of a TOML file, or its top level. Raises ValueError naming the file."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    table = data.get("serve", data)
    return {str(key).replace("-", "_"): value for key, value in table.items()}


def build(values: dict[str, Any], where: str) -> Settings:
    """Settings from plain values. Raises ValueError naming the field."""
    try:
        return msgspec.convert(values, Settings)
    except (msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
