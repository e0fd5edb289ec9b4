"""Simulator speed: simulated requests per second of CPU, and whether memory grows with the trace.

GSP with 4 workers (128 groups x 32 prompts of 512 to 8192 tokens, output 4, 12 queries/s), for two trace
lengths and several policies. The time is the simulation's own: making a prompt is counted apart. Each row
runs in a process of its own, so that the peak of its memory is its own.

    python benchmarks/simulator_speed.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvist.model import Query
from kvist.sim import SimConfig, simulate
from kvist.workloads.gsp import GSP

POLICIES = (("cache_aware", "l-lru"), ("cache_aware", "rlt"), ("lbgr", "rlt"))


class Timed:
    """Passes queries on and adds up the CPU time of making them."""

    def __init__(self, queries: Iterator[Query]) -> None:
        self.queries = queries
        self.spent = 0.0
        self.count = 0

    def __iter__(self) -> Iterator[Query]:
        while True:
            before = time.process_time()
            query = next(self.queries, None)
            self.spent += time.process_time() - before
            if query is None:
                return
            self.count += 1
            yield query


def gsp(repeats: int) -> Iterator[Query]:
    """The workload `repeats` times over, each time with prompts of its own."""
    start = 0.0
    for seed in range(repeats):
        arrival = 0.0
        for query in GSP(seed=seed):
            arrival = query.arrival
            query.id = f"{seed}/{query.id}"
            query.arrival += start
            yield query
        start += arrival


@dataclass
class Row:
    """speed and overall: requests a second of CPU, without and with the making of the prompts."""

    requests: int
    speed: float
    overall: float
    peak_mib: float
    hit_rate: float


def measure(router: str, eviction: str, repeats: int) -> Row:
    queries = Timed(gsp(repeats))
    before = time.process_time()
    result = simulate(queries, SimConfig(router=router, eviction=eviction, workers=4))
    spent = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    count = queries.count
    return Row(count, count / (spent - queries.spent), count / spent, peak, result.hit_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, nargs="+", default=[4, 16], help="trace lengths, in 4096 requests"
    )
    lengths = parser.parse_args().repeats
    print("router       eviction  requests   req/s + prompts  peak MiB   hits")
    spawn = multiprocessing.get_context("spawn")
    for router, eviction in POLICIES:
        for repeats in lengths:
            with spawn.Pool(1) as pool:
                row = pool.apply(measure, (router, eviction, repeats))
            print(
                f"{router:<12} {eviction:<9} {row.requests:>8} {row.speed:>7.0f} {row.overall:>9.0f} "
                f"{row.peak_mib:>9.0f} {row.hit_rate:>6.3f}"
            )


if __name__ == "__main__":
    main()
