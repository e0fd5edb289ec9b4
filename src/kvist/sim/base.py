"""What a simulation is given and what it gives back.

    result = simulate(queries, SimConfig(router="lbgr", eviction="rlt", workers=4))

`queries` is any iterable of `kvist.model.Query` in order of arrival; it is consumed lazily, once.
Times are in seconds, lengths in tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from kvist.cache import RECOMMENDED
from kvist.engine.latency import DEFAULT_PROFILE


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker of a mixed fleet; None takes the value of the `SimConfig`.

    `joins` and `leaves` are moments of the run. A worker that leaves with `drains` finishes what it has;
    otherwise it fails and its requests in flight are lost or sent elsewhere (`SimConfig.on_failure`).
    `paces` are (moment, factor): from then on every step takes `factor` times what the profile says, as on a
    GPU that is throttled or shared; (90.0, 1.0) is a recovery.
    """

    id: str
    profile: str | None = None
    kv_tokens: int | None = None
    eviction: str | None = None
    joins: float = 0.0
    leaves: float | None = None
    drains: bool = False
    paces: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A cluster and its policies. Raises ValueError for a value that makes no sense."""

    router: str = "lbgr"
    router_params: dict[str, Any] = field(default_factory=dict)
    eviction: str = RECOMMENDED
    eviction_params: dict[str, Any] = field(default_factory=dict)
    order: str = "fcfs"  # of the engines' waiting queues, see kvist.engine.order
    order_params: dict[str, Any] = field(default_factory=dict)
    workers: int = 4  # alike; `fleet` overrides
    fleet: tuple[WorkerSpec, ...] = ()
    profile: str = DEFAULT_PROFILE  # a shipped profile or the path of a TOML file
    kv_tokens: int | None = None  # KV capacity of a worker; None: what the profile's memory leaves
    block_size: int = 1
    unit: int = 4  # bytes a token in the queries' prompts
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_events: bool = False  # the router knows the caches from their events, not from its own decisions
    on_failure: Literal["reroute", "fail"] = "reroute"
    slo_ttft: float = 2.0
    slo_tpot: float = 0.1
    warmup: int = 0  # requests at the start that count in no metric
    points: int = 256  # at most, of the series over time
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.fleet and self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers}")
        if len({spec.id for spec in self.fleet}) != len(self.fleet):
            raise ValueError("fleet: two workers have the same id")
        for spec in self.fleet:
            if spec.leaves is not None and spec.leaves <= spec.joins:
                raise ValueError(
                    f"worker {spec.id}: leaves ({spec.leaves}) must be after joins ({spec.joins})"
                )
            for moment, factor in spec.paces:
                if not (moment >= 0 and 0 < factor < float("inf")):
                    raise ValueError(
                        f"worker {spec.id}: paces: ({moment}, {factor}) must be a moment from 0 and a factor "
                        "above 0"
                    )
        for tokens in (self.kv_tokens, *(spec.kv_tokens for spec in self.fleet)):
            if tokens is not None and tokens < 1:
                raise ValueError(f"kv_tokens must be at least 1, not {tokens}")
        for name in ("slo_ttft", "slo_tpot"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, not {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 requests, not {self.warmup}")
        if self.points < 2:
            raise ValueError(f"points must be at least 2, not {self.points}")
        if self.on_failure not in ("reroute", "fail"):
            raise ValueError(f"on_failure must be reroute or fail, not {self.on_failure!r}")

    def specs(self) -> tuple[WorkerSpec, ...]:
        return self.fleet or tuple(WorkerSpec(f"w{i}") for i in range(self.workers))


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution of times in seconds; quantiles within 0.5 % of exact. All 0 without any."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """What one worker did. busy: seconds in which it computed."""

    id: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    busy: float
    preemptions: int
    capacity: int


@dataclass(frozen=True, slots=True)
class SimResult:
    """Metrics over the requests after the warm-up; the time-wise figures cover the span of these requests.

    hit_rate: cached prompt tokens / prompt tokens of completed requests. tpot: (last - first token) /
    (output tokens - 1), of requests with at least two. throughput: completed requests a second. goodput:
    those within both SLOs a second. imbalance: the busiest worker's busy time over the mean (1: even).
    series: `time` (start of each bucket) and, per worker id, the mean
    number of requests in flight in the bucket.
    """

    requests: int
    completed: int
    failed: int
    refused: int  # longer than a cache, or empty
    rerouted: int
    preemptions: int
    hit_rate: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Summary
    tpot: Summary
    latency: Summary
    throughput: float
    output_throughput: float
    goodput: float
    slo_attainment: float
    imbalance: float
    makespan: float  # first arrival to last token, of all requests
    workers: tuple[WorkerResult, ...]
    series: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data."""
        return asdict(self)
