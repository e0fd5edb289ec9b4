"""One simulated cluster from 4 to 1 024 workers: what a decision costs, what the index weighs, what is hit.

    python benchmarks/scale.py [--workers 4 16 64 256 1024] [--routers lbgr] [--per-worker 64]

Shared-prefix workload that grows with the cluster: 8 groups of prompts a worker, 512 to 2 048 tokens, half of
each shared; 5.5 requests/s a worker (an L40 with an 8B model is busy for about two thirds of the time with
that); KV caches of 50 000 tokens in blocks of 16. Decisions in microseconds of CPU time, index and
bookkeeping included; `req/s` simulated requests a second of CPU time; `routing` the share of that which the
router takes: what is left is all that engines in other processes could save. Each row runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from statistics import median, quantiles
from time import process_time, thread_time
from typing import Any

from kvist.model import Query
from kvist.routing import Outcome, Router, Ticket
from kvist.sim import Cluster, SimConfig
from kvist.workloads import make_workload


class Timed(Router):
    """A router that looks at its watch."""

    decisions: list[float]
    spent = 0.0

    def route(self, query: Query, now: float, allowed: Collection[str] | None = None) -> Ticket:
        start = thread_time()
        ticket = super().route(query, now, allowed)
        took = thread_time() - start
        self.decisions.append(took)
        self.spent += took
        return ticket

    def first_token(self, ticket: Ticket, now: float) -> None:
        start = thread_time()
        super().first_token(ticket, now)
        self.spent += thread_time() - start

    def complete(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        start = thread_time()
        super().complete(ticket, outcome, now)
        self.spent += thread_time() - start


def weight(root: Any) -> int:
    """Bytes of an object and all that it holds, each once; classes and functions left out."""
    seen: set[int] = set()
    total, stack = 0, [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, dict):
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        else:
            slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            stack += [getattr(item, name) for name in slots if hasattr(item, name)]
            if hasattr(item, "__dict__"):
                stack.append(item.__dict__)
    return total


def measure(job: tuple[int, str, int]) -> str:
    workers, name, per_worker = job
    groups = 8 * workers
    workload = make_workload(
        f"gsp:groups={groups},prompts={per_worker // 8},lengths=512/1024/2048", rate=5.5 * workers, seed=1
    )
    cluster = Cluster(SimConfig(router=name, workers=workers, kv_tokens=50_000, block_size=16, seed=1))
    router = cluster.router
    cluster.router = timed = Timed(router.policy, index=router.index)
    timed.decisions = []
    start = process_time()
    result = cluster.run(workload)
    spent = process_time() - start
    taken = timed.decisions[len(timed.decisions) // 4 :]
    return (
        f"{workers:>7} {name:<12}{result.requests:>9}{median(taken) * 1e6:>9.0f}"
        f"{quantiles(taken, n=100)[98] * 1e6:>8.0f}{weight(timed.index) / 2**20:>10.1f}"
        f"{result.hit_rate:>9.1%}{result.ttft.mean * 1e3:>9.0f}{result.ttft.p99 * 1e3:>8.0f}"
        f"{result.imbalance:>10.3f}{result.requests / spent:>9.0f}{timed.spent / spent:>9.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--routers", nargs="+", default=["lbgr"])
    parser.add_argument("--per-worker", type=int, default=64, help="requests a worker")
    args = parser.parse_args()
    print(
        f"{'workers':>7} {'router':<12}{'requests':>9}{'p50 us':>9}{'p99':>8}{'index MB':>10}"
        f"{'hits':>9}{'TTFT ms':>9}{'p99':>8}{'imbalance':>10}{'req/s':>9}{'routing':>9}",
        flush=True,
    )
    for workers in args.workers:
        for name in args.routers:
            with ProcessPoolExecutor(1) as pool:
                print(pool.submit(measure, (workers, name, args.per_worker)).result(), flush=True)


if __name__ == "__main__":
    main()
