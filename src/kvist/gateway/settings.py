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


class WorkerSpec(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A worker with settings of its own: `[[serve.workers]]`, or the body of POST /workers.

    kv_events, kv_events_replay: ZeroMQ addresses, as in Settings; each of `data_parallel_size` ranks uses the
    port behind that of the rank before it.
    """

    url: str
    kv_events: str = ""
    kv_events_replay: str = ""
    data_parallel_size: int = 1

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not 1 <= self.data_parallel_size <= 1024:
            raise ValueError(f"data_parallel_size must lie between 1 and 1024, not {self.data_parallel_size}")


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Names follow the SGLang lineage where it has one. Times in seconds. Raises ValueError."""

    worker_urls: list[str] = []
    workers: list[WorkerSpec] = []
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

    tokenizer: list[str] = []  # PATH or MODEL=PATH; empty: prompts are text
    # Addresses of KV events: a port, or tcp://{host}:{port+1000}; one for all worker_urls, or one for each.
    kv_events: list[str] = []
    kv_events_replay: list[str] = []
    kv_events_topic: str = ""
    data_parallel_size: int = 1  # engines behind one worker URL, each with its own events

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
        self._check_events()
        for path in self.allow_paths:
            if not path.startswith("/"):
                raise ValueError(f"allow_paths: {path!r} must start with /")

    def _check_events(self) -> None:
        for name in ("kv_events", "kv_events_replay"):
            given = len(getattr(self, name))
            if given not in (0, 1, len(self.worker_urls)):
                raise ValueError(
                    f"{name}: give one address for all workers, or one for each of the "
                    f"{len(self.worker_urls)} worker_urls, not {given}"
                )
        if self.kv_events_replay and not self.kv_events:
            raise ValueError("kv_events_replay needs kv_events")
        if self.follows_events and not self.tokenizer:
            raise ValueError(
                "kv_events needs tokenizer: events name token ids, and prompts must be made of them"
            )
        self.specs()

    @property
    def follows_events(self) -> bool:
        """Whether KV events are subscribed to at all."""
        return bool(self.kv_events) or any(worker.kv_events for worker in self.workers)

    def specs(self) -> list[WorkerSpec]:
        """All workers: those with settings of their own, and those of `worker_urls`. Raises ValueError."""
        found = {worker.url: worker for worker in self.workers}
        for i, url in enumerate(self.worker_urls):
            spec = self.spec(url, i)
            found.setdefault(spec.url, spec)
        return list(found.values())

    def spec(self, url: str, place: int = 0) -> WorkerSpec:
        """The worker that a bare URL means; `place` among worker_urls."""
        events, replay = (
            values[min(place, len(values) - 1)] if values else ""
            for values in (self.kv_events, self.kv_events_replay)
        )
        return WorkerSpec(
            url=url, kv_events=events, kv_events_replay=replay, data_parallel_size=self.data_parallel_size
        )


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
