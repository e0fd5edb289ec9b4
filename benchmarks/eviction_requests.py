"""What a whole request costs in the cache (match, evict, insert), by eviction policy, beside L-LRU.

    python benchmarks/eviction_requests.py [--percent 3] [--rounds 3]

Rounds alternate between the policies in one process; CPU time, the median round counts.
"""

from __future__ import annotations

import argparse
from random import Random
from statistics import median
from time import process_time

from kvist.cache import PrefixCache, make_eviction
from kvist.cachebench import working_set
from kvist.workloads import make_workload

POLICIES = ("l-lru", "rlt", "s3-fifo", "lhd", "hedge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--percent", type=float, default=3, help="cache, %% of the distinct tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", default=["gsp", "loogle", "sharegpt:clients=400"])
    args = parser.parse_args()
    print(f"CPU microseconds a request, blocks of 16, cache of {args.percent:g} % (beside l-lru)\n")
    for spec in args.workloads:
        queries = list(make_workload(spec))
        size = int(working_set(spec, None, 0, 16)[0] * args.percent / 100)
        times: dict[str, list[float]] = {name: [] for name in POLICIES}
        for _ in range(args.rounds):
            for name in POLICIES:
                cache = PrefixCache(size, make_eviction(name, rng=Random(1)), block_size=16)
                start = process_time()
                for query in queries:
                    cache.serve(query.prompt, query.arrival, query.salt, query)
                times[name].append((process_time() - start) / len(queries) * 1e6)
        base = median(times["l-lru"])
        row = ", ".join(f"{n} {median(t):.0f} ({median(t) / base:.1f})" for n, t in times.items())
        print(f"{spec}: {row}", flush=True)


if __name__ == "__main__":
    main()
