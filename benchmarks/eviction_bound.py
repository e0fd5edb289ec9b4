"""How much of the gap between L-LRU and the optimum can any online policy close? Two policies that know more.

    python benchmarks/eviction_bound.py [--percent 1 3 10 30] [--seeds 3]

`law` is told how the workload's generator works, and ranks by the expected number of requests to come, or by
the chance that there is one: of a conversation (of 2, 4, 6, 8 turns; any unfinished one equally likely next),
of a document (4 to 12 questions, shuffled), of a group (as many prompts as all others, shuffled, or in turn).
It is also told which part of a prompt can come back at all. `remaining` is told how often each block will be
used again, but not when, and evicts the least. Both know more than an online policy can; neither is a proven
bound, because the rank is greedy.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections import Counter
from math import comb
from random import Random
from statistics import mean
from typing import Any

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.base import EvictionPolicy
from kvist.cache.belady import Belady, Future
from kvist.cachebench import working_set
from kvist.model import Query
from kvist.prefix.tree import Node, common_prefix
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


class Law(EvictionPolicy):
    """Evicts what cannot come back, then what has the lowest `worth`, then the least recently used."""

    name = "law"
    description = source = "benchmark"

    def __init__(self, queries: list[Query]) -> None:
        super().__init__()
        self.total = len(queries)
        self.left = Counter(q.session for q in queries)
        self.asked: Counter[str] = Counter()
        self.used: dict[str, int] = {}
        self.now, self.session = 0, ""
        self.leaves: dict[Node, None] = {}
        self.comes_back = {session: self.shared(prompts) for session, prompts in _prompts(queries).items()}

    def shared(self, prompts: list[bytes]) -> int:
        """Blocks of a session's prompts that can come back."""
        blocks = [common_prefix(prompts[0], 0, p, len(p)) // (BLOCK * 4) for p in prompts[1:]]
        return min(blocks, default=0)

    def worth(self, session: str) -> float:
        raise NotImplementedError

    def begin(self, query: Query | None, now: float) -> None:
        assert query is not None
        self.unfinished = sum(1 for left in self.left.values() if left)
        self.now += 1
        self.session = query.session
        self.left[self.session] -= 1
        self.asked[self.session] += 1
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

    def useless(self, node: Node) -> int:
        """Blocks at the node's end that cannot come back."""
        depth, above = 0, node
        while above.parent is not None:
            depth += above.size
            above = above.parent
        return max(min(depth - self.comes_back[node.state], node.size), 0)

    def rank(self, node: Node) -> tuple[bool, float, int]:
        return not self.useless(node), self.worth(node.state), self.used[node.state]

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and self.leaves:
            node = min(self.leaves, key=self.rank)
            taken = min(self.useless(node) or node.size, blocks - freed)
            self.cache.trim(node, taken)
            freed += taken
        return freed


class Conversations(Law):
    def shared(self, prompts: list[bytes]) -> int:
        return max(map(len, prompts))  # all of it

    def worth(self, session: str) -> float:
        """The chance that the conversation is unfinished, given that it was idle so long."""
        prior = GOES_ON[self.asked[session]]
        idle = prior * (1 - 1 / max(self.unfinished, 1)) ** (self.now - self.used[session])
        return idle / (idle + 1 - prior + 1e-12)


class Documents(Law):
    def worth(self, session: str) -> float:
        """Expected questions left: 4 … 12 in all, equally likely, `asked` in this part of the shuffle."""
        asked, part = self.asked[session], self.now / self.total
        chances = {n: comb(n, asked) * (1 - part) ** (n - asked) for n in range(max(4, asked), 13)}
        return sum((n - asked) * c for n, c in chances.items()) / (sum(chances.values()) or 1.0)


class Groups(Law):
    def worth(self, session: str) -> float:
        return self.left[session]  # all groups have as many prompts


class RoundRobin(Groups):
    def rank(self, node: Node) -> tuple[bool, float, int]:
        """The group whose turn is furthest away is the one that was used last."""
        return not self.useless(node), -self.used[node.state], 0


def _prompts(queries: list[Query]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for query in queries:
        found.setdefault(query.session, []).append(query.prompt)
    return found


LAWS = {
    "gsp": Groups,
    "gsp:order=round_robin": RoundRobin,
    "sharegpt": Conversations,
    "ultrachat": Conversations,
    "loogle": Documents,
}


def hit_rate(policy: EvictionPolicy, size: int, queries: list[Query]) -> float:
    cache = PrefixCache(size, policy, block_size=BLOCK)
    hits = sum(cache.serve(q.prompt, q.arrival, q.salt, q) for q in queries)
    return hits / sum(q.length for q in queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--percent", nargs="*", type=float, default=[1, 3, 10, 30], help="cache sizes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--workloads", nargs="*", default=["gsp", "gsp:order=round_robin", "sharegpt", "loogle"]
    )
    args = parser.parse_args()
    print(f"share of the gap l-lru -> optimum closed, mean of {args.seeds} seeds, blocks of {BLOCK}\n")
    print(f"{'workload':<24}{'cache':>6}{'l-lru':>8}{'optimum':>8}{'hedge':>8}{'law':>8}{'remaining':>11}")
    for spec in args.workloads:
        for percent in args.percent:
            shares: dict[str, list[float]] = {"hedge": [], "law": [], "remaining": []}
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
                if spec in LAWS:
                    found["law"] = LAWS[spec](queries)
                for name, policy in found.items():
                    gap = high - low
                    shares[name].append((hit_rate(policy, size, queries) - low) / gap if gap > 0.005 else 0.0)
            low, high = mean(e[0] for e in ends), mean(e[1] for e in ends)
            cells = "".join(
                f"{100 * mean(shares[n]):{w}.0f}%" if shares[n] and high - low > 0.005 else f"{'-':>{w + 1}}"
                for n, w in (("hedge", 7), ("law", 7), ("remaining", 10))
            )
            print(f"{spec:<24}{percent:5g}%{100 * low:7.1f}%{100 * high:7.1f}%{cells}", flush=True)


if __name__ == "__main__":
    main()
