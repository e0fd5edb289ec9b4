"""Two set-ups under the same traffic, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvist.demo.processes import Cluster
from kvist.demo.traffic import Sent, drive, jobs
from kvist.workloads.gsp import GSP

USUAL = ("cache_aware", "l-lru")
OURS = ("lbgr", "hedge")
LATE = 0.02  # seconds; beyond, the client's clock measures the machine


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
    late_p99: float  # how late the client sent, of its own clock

    @property
    def pair(self) -> str:
        return f"{self.router} + {self.eviction}"


@dataclass(frozen=True, slots=True)
class Trial:
    """A set-up and every request behind its figures."""

    setup: Setup
    sent: Sequence[Sent]
    speed: float


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
            f"{self.groups * self.prompts:,} chat requests in {self.groups} groups that share half of their "
            f"prompts (512 to 8192 tokens, the paper's GSP), {self.rate:g} a second, to {self.workers} "
            "embedded engines: models of a Llama 3.1 8B on an L40, run "
            f"{self.speed:g} times faster than real time"
        )


def measure(router: str, eviction: str, scale: Scale, progress: Callable[[], None]) -> Trial:
    """Start the set-up, send the workload, stop it again. Raises RuntimeError where nothing was answered."""
    work = jobs(scale.workload(), scale.speed)
    with Cluster(router, eviction, scale.workers, scale.speed, scale.seed) as cluster:
        sent, failed, seconds = drive(cluster.url, work, progress)
    if not sent:
        raise RuntimeError(f"{router} + {eviction}: no request was answered")
    ttft = np.array([s.ttft for s in sent]) * scale.speed
    latency = np.array([s.latency for s in sent]) * scale.speed
    prompt = sum(s.prompt_tokens for s in sent)
    p50, p95, p99 = (float(q) for q in np.percentile(ttft, [50, 95, 99]))
    setup = Setup(
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
        late_p99=float(np.percentile([s.late for s in sent], 99)),
    )
    return Trial(setup, sent, scale.speed)


def compare(pairs: Sequence[tuple[str, str]], scale: Scale, progress: Callable[[], None]) -> list[Trial]:
    return [measure(router, eviction, scale, progress) for router, eviction in pairs]


def verdict(usual: Setup, ours: Setup) -> str:
    """The outcome in plain words, whichever way it went."""
    sooner = [
        f"{_times(getattr(usual, field), getattr(ours, field))} {words}"
        for field, words in (("ttft_mean", "to the first token"), ("latency_mean", "to the whole answer"))
    ]
    change = (ours.hit_rate - usual.hit_rate) * 100
    return (
        f"On average {ours.pair} took {sooner[0]} and {sooner[1]}, compared to {usual.pair}; "
        f"it found {abs(change):.1f} points {'more' if change >= 0 else 'less'} of the prompts in the caches."
    )


def _times(before: float, after: float) -> str:
    change = 100 * (after / before - 1) if before else 0.0
    return f"{abs(change):.0f} % {'less' if change <= 0 else 'MORE'} time"


def caution(setups: Sequence[Setup], speed: float) -> str:
    """A warning where the machine could not keep up with the clock; else empty."""
    late = max(setup.late_p99 for setup in setups)
    if late < LATE:
        return ""
    return (
        f"This machine was too busy to keep time: 1 request in 100 left over {late * 1000:,.0f} ms late, "
        f"{late * speed:.1f} modelled seconds. For sound figures close what else runs, or lower --speed."
    )
