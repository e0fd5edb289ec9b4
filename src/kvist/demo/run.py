"""Two set-ups under the same traffic, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvist.demo.processes import Cluster
from kvist.demo.traffic import drive, jobs
from kvist.workloads.gsp import GSP

USUAL = ("cache_aware", "l-lru")
OURS = ("lbgr", "rlt")


@dataclass(frozen=True, slots=True)
class Setup:
    """Figures of one set-up; times in modelled seconds (the client's clock times the speed-up)."""

    router: str
    eviction: str
    requests: int
    failed: int
    hit_rate: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    latency_mean: float
    latency_p99: float
    throughput: float

    @property
    def pair(self) -> str:
        return f"{self.router} + {self.eviction}"


@dataclass(frozen=True, slots=True)
class Scale:
    """What is run: the paper's GSP at its rate and sizes, fewer prompts a group, faster than real time."""

    groups: int = 128
    prompts: int = 20
    rate: float = 12.0
    workers: int = 4
    speed: float = 10.0
    seed: int = 0

    def workload(self) -> GSP:
        return GSP(groups=self.groups, prompts=self.prompts, rate=self.rate, seed=self.seed)

    def describe(self) -> str:
        return (
            f"{self.groups} groups x {self.prompts} prompts of 512 to 8192 tokens (32 a group in the paper), "
            f"half of each shared, 4 output tokens, {self.rate:g} requests/s, {self.workers} embedded "
            f"engines modelling L40 GPUs, run {self.speed:g} times faster than real time"
        )


def measure(router: str, eviction: str, scale: Scale, progress: Callable[[], None]) -> Setup:
    """Start the set-up, send the workload, stop it again."""
    work = jobs(scale.workload(), scale.speed)
    with Cluster(router, eviction, scale.workers, scale.speed, scale.seed) as cluster:
        sent, failed, seconds = drive(cluster.url, work, progress)
    if not sent:
        raise RuntimeError(f"{router} + {eviction}: no request was answered")
    ttft = np.array([s.ttft for s in sent]) * scale.speed
    latency = np.array([s.latency for s in sent]) * scale.speed
    prompt = sum(s.prompt_tokens for s in sent)
    p50, p95, p99 = (float(q) for q in np.percentile(ttft, [50, 95, 99]))
    return Setup(
        router=router,
        eviction=eviction,
        requests=len(sent),
        failed=failed,
        hit_rate=sum(s.cached_tokens for s in sent) / prompt,
        ttft_mean=float(ttft.mean()),
        ttft_p50=p50,
        ttft_p95=p95,
        ttft_p99=p99,
        latency_mean=float(latency.mean()),
        latency_p99=float(np.percentile(latency, 99)),
        throughput=len(sent) / (seconds * scale.speed),
    )


def compare(pairs: Sequence[tuple[str, str]], scale: Scale, progress: Callable[[], None]) -> list[Setup]:
    return [measure(router, eviction, scale, progress) for router, eviction in pairs]


def verdict(usual: Setup, ours: Setup) -> str:
    """The outcome in plain words, whichever way it went."""
    parts = []
    for name, field in (
        ("mean TTFT", "ttft_mean"),
        ("p99 TTFT", "ttft_p99"),
        ("mean latency", "latency_mean"),
    ):
        before, after = getattr(usual, field), getattr(ours, field)
        ratio = before / after if after else 1.0
        word = "lower" if ratio >= 1 else "HIGHER"
        parts.append(f"{name} {max(ratio, 1 / ratio):.2f} times {word}")
    change = (ours.hit_rate - usual.hit_rate) * 100
    return f"{ours.pair} against {usual.pair}: {', '.join(parts)}; cache hits {change:+.1f} points."
