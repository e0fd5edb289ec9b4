"""How much of the gap between L-LRU and the optimum can any online policy close? Two policies that know more.

    python benchmarks/eviction_bound.py [--percent 3 10 30] [--seeds 3]

`remaining` is told how often each block will be used again, but not when, and evicts the least. `model` is
told how the chat generator works (turns of 2, 4, 6, 8; every unfinished conversation equally likely next) and
ranks by the exact chance that a conversation still goes on, given its turns and its idle time. Both know more
than an online policy can; neither is a proven bound, because the rank is greedy.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections import Counter
from random import Random
from statistics import mean
from typing import Any

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.base import EvictionPolicy
from kvist.cache.belady import Belady, Future
from kvist.cachebench import working_set
from kvist.model import Query
from kvist.prefix.tree import Node
from kvist.workloads import make_workload

BLOCK = 16
GOES_ON = {1: 1.0, 2: 3 / 4, 3: 1.0, 4: 2 / 3, 5: 1.0, 6: 1 / 2, 7: 1.0, 8: 0.0}  # turns so far


class Remaining(Belady):
    """Belady's view of the future, of which it uses the number of uses only."""

    def hit(self, node: Node, now: float) -> None:
        node.last = now

    touch = hit

    def insert(self, node: Node, now: float) -> None:
        node.last = now
        super().insert(node, now)

    def split(self, upper: Node, lower: Node) -> None:
        super().split(upper, lower)
        upper.last = lower.last

    def priority(self, node: Node) -> Any:
        times = node.state[0].state
        return len(times) - bisect_right(times, self._time), node.last


class Model(EvictionPolicy):
    name = "model"
    description = source = "benchmark"

    def __init__(self, left: Counter[str]) -> None:
        super().__init__()
        self.left = left
        self.turns: Counter[str] = Counter()
        self.used: dict[str, int] = {}
        self.now, self.session = 0, ""
        self.leaves: dict[Node, None] = {}

    def begin(self, query: Query | None, now: float) -> None:
        assert query is not None
        self.unfinished = sum(1 for left in self.left.values() if left)
        self.now += 1
        self.session = query.session
        self.left[self.session] -= 1
        self.turns[self.session] += 1
        self.used[self.session] = self.now

    def hit(self, node: Node, now: float) -> None:
        node.state = self.session

    insert = hit

    def split(self, upper: Node, lower: Node) -> None:
        upper.state = lower.state

    def candidate(self, node: Node) -> None:
        self.leaves[node] = None

    def retract(self, node: Node) -> None:
        del self.leaves[node]

    def chance(self, node: Node) -> tuple[float, int]:
        """That the node's conversation is unfinished, given that it was idle so long."""
        session = node.state
        prior = GOES_ON[self.turns[session]]
        idle = prior * (1 - 1 / max(self.unfinished, 1)) ** (self.now - self.used[session])
        return idle / (idle + 1 - prior + 1e-12), self.used[session]

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and self.leaves:
            node = min(self.leaves, key=self.chance)
            taken = min(node.size, blocks - freed)
            self.cache.trim(node, taken)
            freed += taken
        return freed


def hit_rate(policy: EvictionPolicy, size: int, queries: list[Query]) -> float:
    cache = PrefixCache(size, policy, block_size=BLOCK)
    hits = sum(cache.serve(q.prompt, q.arrival, q.salt, q) for q in queries)
    return hits / sum(q.length for q in queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--percent", nargs="*", type=float, default=[3, 10, 30], help="cache sizes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workloads", nargs="*", default=["gsp", "gsp:order=round_robin", "sharegpt", "loogle"]
    )
    args = parser.parse_args()
    print(f"share of the gap l-lru -> optimum closed, mean of {args.seeds} seeds, blocks of {BLOCK}\n")
    print(f"{'workload':<24}{'cache':>6}{'l-lru':>8}{'optimum':>8}{'hedge':>8}{'model':>8}{'remaining':>11}")
    for spec in args.workloads:
        for percent in args.percent:
            shares: dict[str, list[float]] = {"hedge": [], "model": [], "remaining": []}
            ends: list[tuple[float, float]] = []
            for seed in range(args.seeds):
                queries = list(make_workload(spec, seed=seed))
                size = int(working_set(spec, None, seed, BLOCK)[0] * percent / 100)
                future = Future(queries, BLOCK * 4)
                low = hit_rate(make_eviction("l-lru"), size, queries)
                high = hit_rate(Belady(future=future), size, queries)
                ends.append((low, high))
                found: dict[str, EvictionPolicy] = {
                    "hedge": make_eviction("hedge", rng=Random(f"{seed}/hedge")),
                    "remaining": Remaining(future=future),
                }
                if spec in ("sharegpt", "ultrachat"):
                    found["model"] = Model(Counter(q.session for q in queries))
                for name, policy in found.items():
                    gap = high - low
                    shares[name].append((hit_rate(policy, size, queries) - low) / gap if gap > 0.005 else 0.0)
            low, high = mean(e[0] for e in ends), mean(e[1] for e in ends)
            cells = "".join(
                f"{100 * mean(shares[n]):{w}.0f}%" if shares[n] and high - low > 0.005 else f"{'-':>{w + 1}}"
                for n, w in (("hedge", 7), ("model", 7), ("remaining", 10))
            )
            print(f"{spec:<24}{percent:5g}%{100 * low:7.1f}%{100 * high:7.1f}%{cells}", flush=True)


if __name__ == "__main__":
    main()
