"""What each ingredient of LBGR is worth: time to first token of the policy without it, over the policy's.

    python benchmarks/routing_ablation.py [--seeds 3] [--traces FOLDER] [--only WORDS] [--orders]

A part of the routing suite's design points, loaded and light; geometric means of the ratios, above 1: the
ingredient helps. After +-: half the 95 % interval over seeds. --orders: instead, the engines' queue orders
under LBGR and a rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from kvist.bench import half_width
from kvist.engine.order import ORDERS
from kvist.routesuite import DECODING, FLEETS, MIXED, Point, Unit, run_unit, workloads
from kvist.routing.lbgr import policy, queue, worker

PLAIN = (
    "gsp:prompts=12",
    "gsp:prompts=12,order=round_robin",
    "sharegpt:clients=300",
    "gsp:prompts=12,output=128",
)
LOADS = (0.3, 0.9)


def decaying(self: queue.PrefillQueue, now: float, pace: float, base: float = 0.0) -> tuple[float, float]:
    """The queue as if no first token were ever seen: it drains on the pace alone."""
    if not len(self):
        return 0.0, 0.0
    return max(self.total - max(now - self._since, 0.0) / pace - self._credit, 0.0), 0.0


def punctual(self: queue.PrefillQueue, now: float, pace: float, base: float = 0.0) -> tuple[float, float]:
    """The queue as if nothing were ever overdue."""
    return look(self, now, pace, base)[0], 0.0


look = queue.PrefillQueue.look


def without(feature: int) -> Callable[[], Any]:
    """Coefficient `feature` is always 0."""
    prior = tuple(0.0 if i == feature else value for i, value in enumerate(worker.PRIOR))
    bounds = tuple((0.0, 0.0) if i == feature else pair for i, pair in enumerate(worker.BOUNDS))
    return lambda: patch.multiple(worker, PRIOR=prior, BOUNDS=bounds)


def _never(self: worker.Worker) -> float:
    return float("inf")


def _ignore(self: worker.Worker, value: float) -> None:
    pass


ABLATIONS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "price": ({"congestion": 0.0}, nullcontext),
    "first tokens bound the drain": ({}, lambda: patch.object(queue.PrefillQueue, "look", decaying)),
    "overdue": ({}, lambda: patch.object(queue.PrefillQueue, "look", punctual)),
    "quadratic term": ({}, lambda: patch.object(policy, "CONTEXT", 0.0)),
    "interference": ({}, without(2)),
    "crowd": ({}, lambda: patch.object(policy, "CROWD", 0.0)),
    "common factor": ({}, lambda: patch.multiple(worker, TOGETHER=0.0, SPREAD=(0.3, 1.0, 0.01))),
    "drift factor": ({}, lambda: patch.object(worker, "FAST", 0.0)),
    "trying again": ({}, lambda: patch.object(worker.Worker, "patience", property(_never, _ignore))),
    "near equals": ({}, lambda: patch.multiple(policy, CLOSE=0.0, CLOSE_SECONDS=0.0)),
}
Figures = dict[tuple[bool, str], list[float]]  # (loaded, figure): logs, seed by seed for each point


def points(traces: Path | None) -> list[Point]:
    pairs = [(workload, fleet) for workload in PLAIN for fleet in FLEETS[:3]]
    pairs += [(workload, fleet) for workload in DECODING for fleet in MIXED]
    if traces is not None:
        pairs += [(workload, FLEETS[1]) for workload in workloads(traces) if workload.startswith("trace")]
    return [Point(workload, fleet, load) for workload, fleet in pairs for load in LOADS]


def figures(found: Sequence[Point], seeds: int, params: dict[str, Any], **more: Any) -> Figures:
    logs: Figures = {}
    router = more.pop("router", "lbgr")
    for point in found:
        for seed in range(seeds):
            result = run_unit(Unit(point, router, tuple(params.items()), seed, **more))
            for figure in ("mean", "p99"):
                logs.setdefault((point.loaded, figure), []).append(log(getattr(result.ttft, figure)))
    return logs


def ratios(name: str, found: Figures, base: Figures, seeds: int) -> None:
    row = f"{name:34}"
    for key in ((True, "mean"), (True, "p99"), (False, "mean"), (False, "p99")):
        differences = [a - b for a, b in zip(found[key], base[key], strict=True)]
        by_seed = [mean(differences[seed::seeds]) for seed in range(seeds)]
        width = half_width(by_seed) if seeds > 1 else 0.0
        row += f"{exp(mean(by_seed)):9.3f} +-{width:.3f}"
    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--only", default="", help="ablations whose name has these words")
    parser.add_argument("--orders", action="store_true")
    args = parser.parse_args()
    found, seeds = points(args.traces), args.seeds
    print(f"{len(found)} points, {seeds} seeds")
    print(f"{'':34}{'loaded':>15}{'p99':>15}{'light':>15}{'p99':>15}", flush=True)
    if args.orders:
        for router in ("lbgr", "cache_aware"):
            base = figures(found, seeds, {}, router=router)
            for order in ORDERS:
                ratios(
                    f"{router} {order}", figures(found, seeds, {}, router=router, order=order), base, seeds
                )
        return
    base = figures(found, seeds, {})
    for name, (params, change) in ABLATIONS.items():
        if args.only in name:
            with change():
                ratios(f"without {name}", figures(found, seeds, params), base, seeds)
    if not args.only:
        ratios("lbgr_paper", figures(found, seeds, {}, router="lbgr_paper"), base, seeds)


if __name__ == "__main__":
    main()
