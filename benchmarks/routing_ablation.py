"""What each ingredient of LBGR is worth: the policy without it, over the policy, time to first token.

    python benchmarks/routing_ablation.py [--seeds 2] [--orders]

Loaded and light points of the routing suite's generated workloads on its three fleets; geometric means of the
ratios, above 1: the ingredient helps. --orders: instead, the engines' queue orders under LBGR and a rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp, log
from statistics import mean
from typing import Any
from unittest.mock import patch

from kvist.engine.order import ORDERS
from kvist.routesuite import FLEETS, Point, Unit, run_unit
from kvist.routing.lbgr import policy, queue, worker

WORKLOADS = (
    "gsp:prompts=12",
    "gsp:prompts=12,order=round_robin",
    "sharegpt:clients=300",
    "gsp:prompts=12,output=128",
)
LOADS = (0.3, 0.9)


def decaying(self: queue.PrefillQueue, now: float, pace: float) -> tuple[float, float]:
    """The queue as if no first token were ever seen: it drains on the pace alone."""
    if not len(self):
        return 0.0, 0.0
    return max(self.total - max(now - self._since, 0.0) / pace - self._credit, 0.0), 0.0


ABLATIONS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "congestion price": ({"congestion": 0.0}, lambda: patch.object(policy, "VERSION", policy.VERSION)),
    "first tokens bound the queue's drain": ({}, lambda: patch.object(queue.PrefillQueue, "look", decaying)),
    "quadratic term": ({}, lambda: patch.object(policy, "CONTEXT", 0.0)),
    "drift factor": ({}, lambda: patch.object(worker, "FAST", 0.0)),
    "trying workers again": ({}, lambda: patch.object(worker.Worker, "patience", property(_never, _ignore))),
    "near equals: work, emptiest cache": ({}, lambda: patch.multiple(policy, CLOSE=0.0, CLOSE_SECONDS=0.0)),
}


def _never(self: worker.Worker) -> float:
    return float("inf")


def _ignore(self: worker.Worker, value: float) -> None:
    pass


def figures(seeds: int, params: dict[str, Any], **more: Any) -> Iterator[tuple[bool, float, float]]:
    """(loaded, mean, p99) of each point, averaged over seeds."""
    router = more.pop("router", "lbgr")
    for workload in WORKLOADS:
        for fleet in FLEETS[:3]:
            for load in LOADS:
                unit = [
                    Unit(Point(workload, fleet, load), router, tuple(params.items()), seed, **more)
                    for seed in range(seeds)
                ]
                results = [run_unit(each) for each in unit]
                yield load > 0.6, mean(r.ttft.mean for r in results), mean(r.ttft.p99 for r in results)


def ratios(name: str, found: list[tuple[bool, float, float]], base: list[tuple[bool, float, float]]) -> None:
    row = f"{name:40}"
    for loaded in (True, False):
        for k in (1, 2):
            logs = [log(a[k] / b[k]) for a, b in zip(found, base, strict=True) if a[0] is loaded]
            row += f"{exp(mean(logs)):10.3f}"
    print(row, flush=True)


@contextmanager
def without(change: Callable[[], Any]) -> Iterator[None]:
    with change():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--orders", action="store_true")
    args = parser.parse_args()
    print(f"{'':40}{'loaded':>10}{'p99':>10}{'light':>10}{'p99':>10}")
    if args.orders:
        for router in ("lbgr", "cache_aware"):
            base = list(figures(args.seeds, {}, router=router))
            for order in ORDERS:
                ratios(f"{router} {order}", list(figures(args.seeds, {}, router=router, order=order)), base)
        return
    base = list(figures(args.seeds, {}))
    for name, (params, change) in ABLATIONS.items():
        with without(change):
            ratios(f"without {name}", list(figures(args.seeds, params)), base)
    ratios("lbgr_paper", list(figures(args.seeds, {}, router="lbgr_paper")), base)


if __name__ == "__main__":
    main()
