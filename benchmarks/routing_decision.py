"""What one routing decision costs, index and bookkeeping included, for a 4 k-token prompt.

    python benchmarks/routing_decision.py [--workers 4 16 64 256 1024]

Prompts: 64 groups that share 2 048 tokens, 2 048 of their own, so the index holds what a router's would.
The two policies take turns at the same prompts in one run. Medians in microseconds.
"""

from __future__ import annotations

import argparse
from random import Random
from statistics import median, quantiles
from time import perf_counter

import numpy as np

from kvist.model import Query, pack
from kvist.routing import Outcome, Router, Ticket, make_policy

POLICIES = ("lbgr", "cache_aware")


def queries(count: int) -> list[Query]:
    rng = np.random.default_rng(0)
    shared = [rng.integers(0, 1 << 32, size=2048, dtype=np.uint32) for _ in range(64)]
    return [
        Query(i, pack(np.concatenate([shared[i % 64], rng.integers(0, 1 << 32, size=2048, dtype=np.uint32)])))
        for i in range(count)
    ]


def measure(workers: int, work: list[Query]) -> dict[str, list[float]]:
    """Seconds of each decision after a warm-up of a quarter of the queries."""
    times: dict[str, list[float]] = {}
    routers = {}
    for name in POLICIES:
        routers[name] = Router(make_policy(name, rng=Random(1)))
        for i in range(workers):
            routers[name].add_worker(f"w{i}", capacity=200_000)
    flying: dict[str, list[Ticket]] = {name: [] for name in POLICIES}
    for number, query in enumerate(work):
        now = number * 0.01
        for name, router in routers.items():
            start = perf_counter()
            ticket = router.route(query, now)
            spent = perf_counter() - start
            if number >= len(work) // 4:
                times.setdefault(name, []).append(spent)
            flying[name].append(ticket)
            if len(flying[name]) > 4 * workers:
                router.complete(flying[name].pop(0), Outcome(), now)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--queries", type=int, default=2000)
    args = parser.parse_args()
    work = queries(args.queries)
    print(
        f"{'workers':>8}"
        + "".join(f"{name + ' p50 us':>20}{'p99':>8}" for name in POLICIES)
        + f"{'ratio':>8}"
    )
    for workers in args.workers:
        times = measure(workers, work)
        row = f"{workers:>8}"
        for name in POLICIES:
            row += f"{median(times[name]) * 1e6:20.1f}{quantiles(times[name], n=100)[98] * 1e6:8.1f}"
        print(row + f"{median(times['lbgr']) / median(times['cache_aware']):8.2f}")


if __name__ == "__main__":
    main()
