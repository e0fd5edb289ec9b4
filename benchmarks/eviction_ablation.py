"""What is each ingredient of hedge worth? Share of the gap between L-LRU and the optimum, with it taken out.

python benchmarks/eviction_ablation.py [--seeds 2] [--traces ../shared/traces]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import mean

import numpy as np

from kvist.cache import PrefixCache, hazard, hedge, history, make_eviction
from kvist.cache.base import EvictionPolicy
from kvist.cache.belady import Belady, Future
from kvist.cache.hedge import Hedge
from kvist.cache.reuse import Floats, ReuseCounts
from kvist.cachebench import working_set
from kvist.model import Query
from kvist.prefix.tree import Node
from kvist.workloads import make_workload

BLOCK = 16
POINTS = [
    ("gsp", (1, 3)),
    ("gsp:order=round_robin", (1, 3)),
    ("sharegpt", (3, 10, 30)),
    ("loogle", (10, 30)),
    ("chats", (3, 10)),
    ("rag", (3, 10)),
    ("rag:picks=1,drift=0", (1, 3)),
]


class NoLine(Hedge):
    def _line(self, requests: int, top: Node, end: Node) -> int:
        return super()._line(1, top, end)


class NoRoot(Hedge):
    def _line(self, requests: int, top: Node, end: Node) -> int:
        number = super()._line(requests, top, end)
        return number // 14 * 14 + number % 7


class NoLength(Hedge):
    def _size(self, blocks: int) -> int:
        return 3


class NoTemplate(Hedge):
    def _template(self, node: Node) -> int:
        return hedge._TEMPLATES


class OnlyMarking(Hedge):
    """Never trusts: what the fallback alone is worth."""

    def begin(self, query: Query | None, now: float) -> None:
        super().begin(query, now)
        self.budget = -1e18
        if not self.marking:
            self._begin_marking()


class NoMarking(Hedge):
    """Always trusts: what the guarantee costs."""

    def begin(self, query: Query | None, now: float) -> None:
        super().begin(query, now)
        self.budget = 1e18


def no_age(hazard: Floats, horizons: Sequence[np.ndarray]) -> Floats:
    """A block's worth whatever its age: what it is at its use."""
    return np.repeat(_DENSITIES(hazard, horizons)[:, :1], hazard.shape[1], axis=1)


def trusting(used: Floats, expected: Floats, chance: float) -> Floats:
    """Levels as they are counted, but for one event of chance."""
    return (used + chance) / (expected + chance)


def of_blocks(counts: ReuseCounts, kind: int) -> float:
    """Chance in units of a block, as if those of one request were independent."""
    return 1.0


_DENSITIES = hazard._densities


def with_(module: object, name: str, value: object) -> Callable[[], Callable[[], None]]:
    """Set an attribute for a row of the table; returns what puts it back."""

    def enter() -> Callable[[], None]:
        old = getattr(module, name)
        setattr(module, name, value)
        return lambda: setattr(module, name, old)

    return enter


def nothing() -> Callable[[], None]:
    return lambda: None


ROWS: dict[str, tuple[type[Hedge], Callable[[], Callable[[], None]]]] = {
    "hedge": (Hedge, nothing),
    "- requests of the line": (NoLine, nothing),
    "- line starts at the root": (NoRoot, nothing),
    "- length of the last piece": (NoLength, nothing),
    "- requests of templates": (NoTemplate, nothing),
    "- age": (Hedge, with_(hazard, "_densities", no_age)),
    "- classes drawn together by chance": (Hedge, with_(hazard, "_shrunk", trusting)),
    "- what is used together is one event": (Hedge, with_(ReuseCounts, "chance", of_blocks)),
    "- horizons but the first": (Hedge, with_(hedge, "HORIZONS", hedge.HORIZONS[:1])),
    "- a quarter of the memory (8 n)": (Hedge, with_(history, "MEMORY", 8)),
    "- fallback (always trust)": (NoMarking, nothing),
    "only the fallback": (OnlyMarking, nothing),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    args = parser.parse_args()
    points = [(spec, percent) for spec, sizes in POINTS for percent in sizes]
    trace = args.traces / "mooncake_conversation.jsonl"
    if trace.is_file():
        points += [(f"trace:{trace}:limit=4000", percent) for percent in (3, 10, 30)]
    found: dict[str, list[list[float]]] = {name: [] for name in ROWS}
    for spec, percent in points:
        shares: dict[str, list[float]] = {name: [] for name in ROWS}
        for seed in range(args.seeds):
            queries = list(make_workload(spec, seed=seed))
            size = int(working_set(spec, None, seed, BLOCK)[0] * percent / 100)

            def rate(policy: EvictionPolicy, size: int = size, queries: list[Query] = queries) -> float:
                cache = PrefixCache(size, policy, block_size=BLOCK)
                hits = sum(cache.serve(q.prompt, q.arrival, q.salt, q) for q in queries)
                return hits / sum(q.length for q in queries)

            low, high = rate(make_eviction("l-lru")), rate(Belady(future=Future(queries, BLOCK * 4)))
            for name, (policy, enter) in ROWS.items():
                leave = enter()
                shares[name].append((rate(policy(rng=Random(f"{seed}/hedge"))) - low) / (high - low))
                leave()
        for name in ROWS:
            found[name].append(shares[name])
        line = ", ".join(f"{name} {100 * mean(shares[name]):.0f}" for name in ROWS)
        print(f"{spec.split('/')[-1]} {percent} %: {line}", flush=True)
    print(f"\nshare of the gap closed, mean over {len(points)} points and {args.seeds} seeds")
    for name, rows in found.items():
        print(f"{name:<30}{100 * mean(mean(row) for row in rows):6.1f} %")


if __name__ == "__main__":
    main()
