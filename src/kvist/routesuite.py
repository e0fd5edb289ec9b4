"""The standard suite of routing: workloads x fleets x loads x routers, with the clairvoyant for comparison.

A load is a share of the fleet's capacity for the workload: the throughput that `lmetric` reaches when all
requests come at once. From LOADED on a point counts as loaded. What counts is TTFT: for every point a
policy's mean over the best baseline's, and over the clairvoyant's. Held-out workloads and fleets were not
looked at while LBGR was designed and are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

from kvist.bench import half_width
from kvist.sim import SimConfig, SimResult, simulate
from kvist.sim.base import WorkerSpec
from kvist.spread import spread
from kvist.workloads import make_workload

CLAIRVOYANT = "clairvoyant"
BASELINES = ("lmetric", "kv_score", "cache_aware", "preble", "skylb")
DEFAULT = ("lbgr", *BASELINES, "lbgr_paper", CLAIRVOYANT)
QUICK = (0.3, 0.9)
LOADS = (0.3, 0.9, 1.1)
LOADED = 0.6
SLACK = 0.02  # above this share a difference is one, without an interval to tell
FIGURES = ("mean", "p99")
WARM = 0.1  # of the requests, not counted

GENERATED = (
    "gsp:prompts=12",
    "gsp:prompts=12,order=grouped",
    "gsp:prompts=12,order=round_robin",
    "sharegpt:clients=300",
    "loogle:documents=200",
    "gsp:prompts=12,output=128",
)
DECODING = (  # short uncached work and long answers, for the mixed fleets
    "sharegpt:clients=300,message=128,output=64",
    "sharegpt:clients=300,message=256,output=200",
    "gsp:groups=400,prompts=4,shared=0.2,lengths=256/512/1024,output=64",
    "gsp:groups=20,prompts=75,shared=0.93,lengths=4096/6000,output=120",
    "rag:requests=1500",
)
HELD_OUT_GENERATED = (
    "ultrachat:clients=300,message=512,output=64",
    "gsp:groups=300,prompts=5,shared=0.8,lengths=2048/6000,output=32",
    "chats:requests=1500",
    "agents:requests=1500",
)
TRACES = {
    "mooncake_conversation.jsonl": "trace:{}:limit=1500",
    "tau_airline_gpt4o_messages.jsonl.gz": "trace:{}:limit=1500",
}
HELD_OUT_TRACES = {
    "mooncake_conversation.jsonl": "trace:{}:skip=4000,limit=1500",
    "sharegpt_zh_1k_messages.jsonl.gz": "trace:{}:limit=1500",
    "azure2023_conv.csv": "trace:{}:limit=1500",
}

L40, L40S, RTX4090, A100, H100, H200 = (
    f"llama-3.1-8b-{gpu}" for gpu in ("l40", "l40s", "rtx4090", "a100-80g", "h100", "h200")
)


@dataclass(frozen=True, slots=True)
class Fleet:
    """profiles: one a worker. slow: that worker takes `slow` times as long in the middle third of the run."""

    name: str
    profiles: tuple[str, ...]
    slow: float = 1.0
    held_out: bool = False

    def specs(self, duration: float) -> tuple[WorkerSpec, ...]:
        paces = ((duration / 3, self.slow), (duration * 2 / 3, 1.0)) if self.slow != 1.0 else ()
        return tuple(
            WorkerSpec(f"w{i}", profile=profile, paces=paces if i == 0 else ())
            for i, profile in enumerate(self.profiles)
        )


FLEETS = (
    Fleet("4 L40", (L40,) * 4),
    Fleet("2 L40 + 2 H100", (L40, L40, H100, H100)),
    Fleet("4 L40, one 4x slow for a third", (L40,) * 4, slow=4.0),
    Fleet("8 of three kinds", (L40, L40, L40S, L40S, A100, A100, H100, H100), held_out=True),
    Fleet("4 H100, one 3x slow for a third", (H100,) * 4, slow=3.0, held_out=True),
)
MIXED = (
    Fleet("8 of four speeds", (RTX4090, RTX4090, L40, L40, A100, A100, H200, H200)),
    Fleet("1 H100 + 5 L40", (H100, *(L40,) * 5)),
    Fleet("6 A100, one 3x slow for a third", (A100,) * 6, slow=3.0),
)


@dataclass(frozen=True, slots=True)
class Point:
    workload: str
    fleet: Fleet
    load: float
    held_out: bool = False

    @property
    def loaded(self) -> bool:
        return self.load >= LOADED


@dataclass(frozen=True, slots=True)
class Unit:
    point: Point
    router: str
    params: tuple[tuple[str, Any], ...]
    seed: int
    eviction: str = "l-lru"
    order: str = "fcfs"


def workloads(traces: Path | None, *, held_out: bool = False) -> list[str]:
    """Those of the suite, without the traces that the folder lacks."""
    generated, files = (HELD_OUT_GENERATED, HELD_OUT_TRACES) if held_out else (GENERATED, TRACES)
    found = list(generated)
    if traces is not None:
        found += [spec.format(traces / f) for f, spec in files.items() if (traces / f).is_file()]
    return found


def points(traces: Path | None, loads: Sequence[float] = LOADS) -> list[Point]:
    """All points. Those held out have a held-out workload, on a plain fleet and on the held-out ones."""
    found = [Point(workload, fleet, load) for workload in DECODING for fleet in MIXED for load in loads]
    for held_out in (False, True):
        for workload in workloads(traces, held_out=held_out):
            for fleet in FLEETS:
                if fleet.held_out is held_out or (held_out and fleet is FLEETS[0]):
                    found += [Point(workload, fleet, load, held_out) for load in loads]
    return found


@cache
def alone(workload: str, profile: str) -> tuple[float, int]:
    """(requests a second a worker of this kind gets through among four of its kind, number of requests)."""
    fleet = Fleet("", (profile,) * 4)
    config = SimConfig(router="lmetric", eviction="l-lru", fleet=fleet.specs(1.0))
    result = simulate(make_workload(workload, rate=1e4), config)
    return result.completed / result.makespan / 4, result.requests


def capacity(workload: str, fleet: Fleet) -> tuple[float, int]:
    """(requests a second, number of requests): the sum over workers of what each kind gets through."""
    each = [alone(workload, profile) for profile in fleet.profiles]
    return sum(rate for rate, _ in each), each[0][1]


def run_unit(unit: Unit) -> SimResult:
    point = unit.point
    most, count = capacity(point.workload, point.fleet)
    rate = most * point.load
    config = SimConfig(
        router=unit.router,
        router_params=dict(unit.params),
        eviction=unit.eviction,
        order=unit.order,
        fleet=point.fleet.specs(count / rate),
        warmup=int(WARM * count),
        seed=unit.seed,
    )
    return simulate(make_workload(point.workload, rate=rate, seed=unit.seed), config)


@dataclass(frozen=True, slots=True)
class Line:
    """One point: seconds to first token by router, seed by seed; hit rates are means over seeds."""

    workload: str
    fleet: str
    load: float
    held_out: bool
    mean: dict[str, tuple[float, ...]]
    p99: dict[str, tuple[float, ...]]
    hit_rate: dict[str, float]

    @property
    def loaded(self) -> bool:
        return self.load >= LOADED


@dataclass(frozen=True, slots=True)
class Standing:
    """A router on a group of points, for the mean or the 99th percentile.

    to_best: geometric mean over points of its value over that of the point's best baseline (another one);
    to_single: over the single baseline that is best on the whole group; to_clairvoyant: over the clairvoyant.
    worse: points where it is above the best baseline by more than the 95 % interval of the difference, which
    is paired by seed (one seed: 2 %); clearly: those of them that are also more than 2 % above. worst: the
    largest ratio to the best baseline.
    """

    group: str
    router: str
    figure: str
    points: int
    to_best: float
    to_single: float
    to_clairvoyant: float
    worse: int
    clearly: int
    worst: float


@dataclass(frozen=True, slots=True)
class Outcome:
    routers: tuple[str, ...]
    seeds: int
    lines: list[Line]
    standings: list[Standing]


def run(
    found: Sequence[Point],
    routers: Sequence[str] = DEFAULT,
    *,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """The suite's result, the same in any number of processes. Raises ValueError for unknown routers."""
    units = [Unit(point, router, (), seed + i) for point in found for router in routers for i in range(seeds)]
    done: list[SimResult | None] = [None] * len(units)
    for i, result in spread(run_unit, units, jobs=jobs):
        done[i] = result
        progress()
    results = iter([result for result in done if result is not None])
    lines = []
    for point in found:
        runs = {router: [next(results) for _ in range(seeds)] for router in routers}
        lines.append(
            Line(
                point.workload,
                point.fleet.name,
                point.load,
                point.held_out,
                {name: tuple(r.ttft.mean for r in each) for name, each in runs.items()},
                {name: tuple(r.ttft.p99 for r in each) for name, each in runs.items()},
                {name: mean(r.hit_rate for r in each) for name, each in runs.items()},
            )
        )
    return Outcome(tuple(routers), seeds, lines, standings(lines, routers))


def standings(lines: Sequence[Line], routers: Sequence[str]) -> list[Standing]:
    """Each router on loaded and light points, of the design and held out."""
    groups = {
        "loaded": [line for line in lines if line.loaded and not line.held_out],
        "light": [line for line in lines if not line.loaded and not line.held_out],
        "held out, loaded": [line for line in lines if line.loaded and line.held_out],
        "held out, light": [line for line in lines if not line.loaded and line.held_out],
    }
    return [
        _standing(group, some, router, figure)
        for group, some in groups.items()
        if some
        for figure in FIGURES
        for router in routers
    ]


def _standing(group: str, lines: Sequence[Line], router: str, figure: str) -> Standing:
    values = [{name: mean(each) for name, each in getattr(line, figure).items()} for line in lines]
    beside = [beside_best(line, figure, router) for line in lines]
    ratios = [ratio for _, ratio, _ in beside]
    rivals = _rivals(lines[0], router)
    singles = [_mean_ratio([_ratio(value[router], value[name]) for value in values]) for name in rivals]
    known = [value for value in values if CLAIRVOYANT in value]
    bound = _mean_ratio([_ratio(value[router], value[CLAIRVOYANT]) for value in known]) if known else 0.0
    return Standing(
        group,
        router,
        figure,
        len(lines),
        _mean_ratio(ratios),
        max(singles, default=1.0),
        bound,
        sum(worse for _, _, worse in beside),
        sum(worse and ratio > 1.0 + SLACK for _, ratio, worse in beside),
        max(ratios),
    )


def _rivals(line: Line, router: str) -> list[str]:
    return [name for name in line.mean if name in BASELINES and name != router]


def beside_best(line: Line, figure: str, router: str) -> tuple[str, float, bool]:
    """(the best other baseline of a point, `router` over it, whether it is above by more than chance)."""
    values: dict[str, tuple[float, ...]] = getattr(line, figure)
    best = min(_rivals(line, router), key=lambda name: mean(values[name]), default=router)
    return best, _ratio(mean(values[router]), mean(values[best])), above(values[router], values[best])


def losses(lines: Sequence[Line], router: str) -> list[tuple[Line, str, str, float]]:
    """(point, figure, best baseline, ratio to it) wherever `router` is above it by more than chance."""
    beside = [(line, figure, *beside_best(line, figure, router)) for line in lines for figure in FIGURES]
    return [(line, figure, best, ratio) for line, figure, best, ratio, worse in beside if worse]


def above(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether ours is larger by more than chance, seed by seed; of one seed by more than SLACK."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    slack = half_width(differences) if len(differences) > 1 else SLACK * theirs[0]
    return mean(differences) > slack


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 1.0


def _mean_ratio(ratios: Sequence[float]) -> float:
    return exp(mean(log(max(ratio, 1e-9)) for ratio in ratios))
