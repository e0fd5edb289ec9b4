"""Competitive ratios, measured: cost on the adversary's sequence over the optimum's (paper section 2).

The adversary of a cache of n tokens asks for n + 1 prompts of one token each, over and over in the same
order. Leaf-LRU has always just evicted the next one: a miss every time. The optimum misses once in n
requests. RLT's hole is uniform over the unmarked tokens, so the k-th last new request of a phase meets it
with probability 1/k: about H_n = 1 + 1/2 + … + 1/n misses a phase of n requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.belady import Future
from kvist.cachebench import SEEDED
from kvist.model import Query, pack


@dataclass(frozen=True, slots=True)
class Ratio:
    """Cost of each policy over the optimum's, at cache size n in tokens."""

    n: int
    optimum: int  # misses after the cache was filled once
    ratios: dict[str, float]


@dataclass(frozen=True, slots=True)
class Fit:
    """ratio ~ slope * f(n) + intercept, with f the identity (`linear`) or the natural logarithm (`log`)."""

    slope: float
    intercept: float
    r2: float


def adversary(n: int, rounds: int) -> list[Query]:
    """n + 1 prompts of one token, `rounds` times in the same order."""
    prompts = [pack([i]) for i in range(n + 1)]
    return [Query(i, prompts[i % (n + 1)], arrival=float(i)) for i in range(rounds * (n + 1))]


def misses(name: str, n: int, queries: list[Query], future: Future, seed: int) -> int:
    """Missed tokens of a policy after the first n + 1 requests."""
    params = {"future": future} if name == "belady" else {}
    cache = PrefixCache(n, make_eviction(name, rng=Random(f"{seed}/{name}"), **params))
    missed = [query.length - cache.serve(query.prompt, query.arrival, query=query) for query in queries]
    return sum(missed[n + 1 :])


def measure(
    sizes: Iterable[int], policies: Iterable[str], *, rounds: int = 6, seeds: int = 10, seed: int = 0
) -> list[Ratio]:
    """The ratio of each policy, the mean over `seeds` seeds where it is randomized, for each cache size."""
    found = []
    for n in sizes:
        if n < 2:
            raise ValueError(f"sizes: a cache needs at least 2 tokens, not {n}")
        queries = adversary(n, rounds)
        future = Future(queries, 4)
        optimum = misses("belady", n, queries, future, 0)
        ratios = {}
        for name in policies:
            runs = seeds if name in SEEDED else 1
            cost = sum(misses(name, n, queries, future, seed + i) for i in range(runs))
            ratios[name] = cost / runs / optimum
        found.append(Ratio(n, optimum, ratios))
    return found


def fit(rows: list[Ratio], policy: str, shape: str) -> Fit:
    """Least squares of a policy's ratios against n or log n."""
    n = np.array([row.n for row in rows], dtype=float)
    y = np.array([row.ratios[policy] for row in rows])
    x = np.log(n) if shape == "log" else n
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (slope * x + intercept)
    spread = ((y - y.mean()) ** 2).sum()
    return Fit(float(slope), float(intercept), float(1 - (left**2).sum() / spread) if spread else 1.0)


def growth(fits: dict[str, Fit]) -> str:
    """The better of the two fits of one policy in words."""
    shape = max(fits, key=lambda s: fits[s].r2)
    of, f = "n" if shape == "linear" else "ln n", fits[shape]
    return f"grows like {of}: ratio = {f.slope:.3g} {of} {f.intercept:+.2f}, R2 {f.r2:.4f}"
