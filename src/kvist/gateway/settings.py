"""Everything an operator can set, with defaults and checks."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

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
    """Names follow the SGLang lineage where it has one. Times in seconds. Raises ValueError.

    The command line is made of these fields and their descriptions.
    """

    worker_urls: Annotated[
        list[str], Meta(description="Base URLs of the workers; dns+http://HOST:PORT for all that a name has.")
    ] = []
    workers: list[WorkerSpec] = []
    policy: Annotated[str, Meta(description="Routing policy.")] = "lbgr"
    policy_params: Annotated[dict[str, Any], Meta(description="Parameters of the policy, NAME=VALUE.")] = {}
    cache_threshold: Annotated[
        float | None, Meta(description="Of cache_aware: share of the prompt that must match.")
    ] = None
    balance_abs_threshold: Annotated[
        int | None, Meta(description="Of cache_aware: difference in requests that is imbalance.")
    ] = None
    balance_rel_threshold: Annotated[
        float | None, Meta(description="Of cache_aware: if it is also more than this ratio.")
    ] = None
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(description="Port to listen on, 0: any.")] = 8000
    prometheus_host: Annotated[str, Meta(description="Address of --prometheus-port, else --host.")] = ""
    prometheus_port: Annotated[int, Meta(description="Serve /metrics, open to all, on a port too.")] = 0
    seed: Annotated[int, Meta(description="Seed of the policy.")] = 0

    api_keys: Annotated[
        list[str], Meta(description="Keys that clients must send, plain or sha256:HEX; none: open.")
    ] = []
    admin_key: Annotated[str, Meta(description="Key for /workers and /policy.")] = ""
    worker_api_key: Annotated[str, Meta(description="Key sent to the workers instead of the client's.")] = ""

    max_payload_size: Annotated[int, Meta(description="Bytes of a request body.")] = 32 << 20
    max_header_size: Annotated[int, Meta(description="Bytes of a request's headers.")] = 32 << 10
    max_concurrent_requests: Annotated[int, Meta(description="Requests under way.")] = 4096
    queue_size: Annotated[int, Meta(description="Requests that may wait.")] = 1024
    queue_timeout: Annotated[float, Meta(description="Seconds they may wait.")] = 60.0
    rate_limit: Annotated[float, Meta(description="Requests/s of one key, 0: no limit.")] = 0.0
    rate_burst: Annotated[int, Meta(description="Requests at once of one key, 0: one second's.")] = 0

    connect_timeout: Annotated[float, Meta(description="Seconds to connect to a worker.")] = 5.0
    first_byte_timeout: Annotated[float, Meta(description="Seconds to the first byte of an answer.")] = 300.0
    request_timeout: Annotated[float, Meta(description="Seconds a request may take.")] = 1800.0
    slow_client_timeout: Annotated[float, Meta(description="Seconds a client may read nothing.")] = 60.0
    retry_max_retries: Annotated[int, Meta(description="Further workers to try.")] = 2
    cb_failure_threshold: Annotated[
        int, Meta(description="Failures in a row that open a worker's circuit breaker.")
    ] = 5
    cb_timeout_duration: Annotated[float, Meta(description="Seconds it stays open.")] = 30.0
    health_check_interval: Annotated[float, Meta(description="Seconds between checks.")] = 10.0
    health_check_timeout: Annotated[float, Meta(description="Seconds a check may take.")] = 5.0
    health_check_endpoint: Annotated[str, Meta(description="Path that is checked.")] = "/health"
    health_failure_threshold: Annotated[int, Meta(description="Failed checks that make unhealthy.")] = 3
    health_success_threshold: Annotated[int, Meta(description="Good checks that make healthy.")] = 1
    drain_timeout: Annotated[float, Meta(description="Seconds requests get to end on SIGTERM.")] = 30.0

    tokenizer: Annotated[
        list[str], Meta(description="Make prompts token ids: folder with tokenizer.json, or MODEL=FOLDER.")
    ] = []
    kv_events: Annotated[
        list[str],
        Meta(description="Follow KV events: port, or tcp://{host}:{port+1000}; one, or one a worker."),
    ] = []
    kv_events_replay: Annotated[
        list[str], Meta(description="Where missed KV events are replayed, likewise.")
    ] = []
    kv_events_topic: Annotated[str, Meta(description="Topic of the KV events, empty: any.")] = ""
    data_parallel_size: Annotated[
        int, Meta(description="Engines behind each worker URL, for their KV events.")
    ] = 1
    metrics_interval: Annotated[
        float, Meta(description="Seconds between readings of the workers' /metrics, 0: never.")
    ] = 0.0
    index_tokens: Annotated[
        int, Meta(description="Tokens the index remembers of a worker of unknown capacity.")
    ] = 4_000_000

    discovery_interval: Annotated[float, Meta(description="Seconds between look-ups of dns+ names.")] = 10.0
    service_discovery: Annotated[
        bool, Meta(description="Find workers as Kubernetes pods; needs kvist[kubernetes].")
    ] = False
    selector: Annotated[list[str], Meta(description="Labels of these pods, KEY=VALUE.")] = []
    service_discovery_port: Annotated[int, Meta(description="Port of these pods.")] = 8000
    service_discovery_namespace: Annotated[str, Meta(description="Their namespace.")] = "default"
    kubeconfig: Annotated[str, Meta(description="File that says how to reach Kubernetes.")] = ""

    embedded: Annotated[int, Meta(description="Start so many embedded engines (models of engines).")] = 0
    profile: Annotated[str, Meta(description="Of embedded engines: GPU and model.")] = "llama-3.1-8b-l40"
    eviction: Annotated[str, Meta(description="Of embedded engines: eviction policy.")] = "hedge"
    kv_tokens: Annotated[int, Meta(description="Of embedded engines: cache in tokens, 0: the GPU's.")] = 0
    speed: Annotated[float, Meta(description="Of embedded engines: modelled seconds a second.")] = 1.0

    allow_paths: Annotated[list[str], Meta(description="Further worker paths to pass on (POST).")] = []
    snapshot: Annotated[str, Meta(description="File that keeps what was learned.")] = ""
    snapshot_interval: Annotated[float, Meta(description="Seconds between its writings.")] = 60.0
    share_url: Annotated[str, Meta(description="Redis that gateways of a fleet share load over.")] = ""
    share_fleet: Annotated[str, Meta(description="Name of the fleet that shares.")] = "default"
    share_interval: Annotated[float, Meta(description="Seconds between exchanges.")] = 0.2
    snapshot_index: Annotated[bool, Meta(description="At shutdown keep the index too.")] = False
    log_requests: Annotated[bool, Meta(description="Log each request, without its text.")] = False
    otlp_traces_endpoint: Annotated[
        str, Meta(description="URL that OpenTelemetry traces are sent to; needs kvist[otel].")
    ] = ""
    tls_cert: Annotated[str, Meta(description="TLS certificate chain file.")] = ""
    tls_key: Annotated[str, Meta(description="TLS private key file.")] = ""

    def __post_init__(self) -> None:
        for name in ("max_payload_size", "max_header_size", "max_concurrent_requests", "index_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            *("queue_size", "retry_max_retries", "rate_limit", "rate_burst", "metrics_interval"),
            *("embedded", "kv_tokens", "drain_timeout"),
        ):
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
            "share_interval",
            "discovery_interval",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        for name in ("cb_failure_threshold", "health_failure_threshold", "health_success_threshold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("port", "prometheus_port", "service_discovery_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"{name} must lie between 0 and 65535, not {getattr(self, name)}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        self._check_events()
        for path in self.allow_paths:
            if not path.startswith("/"):
                raise ValueError(f"allow_paths: {path!r} must start with /")
        for label in self.selector:
            if not all(label.partition("=")[::2]):
                raise ValueError(f"selector: {label!r} must be KEY=VALUE")
        for url in [*self.worker_urls, *(worker.url for worker in self.workers)]:
            if url.startswith("dns+") and not url.startswith("dns+http://"):
                raise ValueError(f"worker_urls: {url}: a name must be given as dns+http://HOST:PORT")
        if self.service_discovery and not self.selector:
            raise ValueError("service_discovery needs a selector: give the labels of the workers' pods")
        if self.snapshot_index and not self.snapshot:
            raise ValueError("snapshot_index needs snapshot: the index is kept beside it")

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

    def policy_arguments(self) -> dict[str, Any]:
        """Parameters of the policy, those with options of their own included."""
        own = ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold")
        given = {name: value for name in own if (value := getattr(self, name)) is not None}
        return {**self.policy_params, **given}

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
