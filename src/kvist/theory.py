"""Competitive ratios, measured: cost on the adversary's sequence over the optimum's (paper section 2).

The adversary of a cache of n tokens asks for n + 1 prompts of one token each, over and over in the same
order. Leaf-LRU has always just evicted the next one: a miss every time. The optimum misses once in n
requests. RLT's hole is uniform over the unmarked tokens, so the k-th last new request of a phase meets it
with probability 1/k: about H_n = 1 + 1/2 + … + 1/n misses a phase of n requests.

Two more adversaries aim at a policy that predicts. The *trap* first shows it 20 n prompts that never come
back, then cycles. The *hunter* runs a copy of the policy with other random numbers and always asks for what
the copy has just evicted: what is evicted by rule is regretted at once, only random choices escape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.belady import Future
from kvist.cache.events import CacheEvent, Removed
from kvist.cachebench import SEEDED
from kvist.model import TOKEN_BYTES, Query, pack
from kvist.prefix.hashing import block_keys

ADVERSARIES = ("cycle", "trap", "hunter")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Cost of each policy over the optimum's, at cache size n in tokens."""

    n: int
    optimum: int  # misses after the cache was filled once (of the last policy, where each is hunted apart)
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


def trap(n: int, rounds: int) -> list[Query]:
    """20 n prompts that occur once, then the cycle."""
    once = [pack([n + 1 + i]) for i in range(20 * n)]
    cycle = [query.prompt for query in adversary(n, rounds)]
    return [Query(i, prompt, arrival=float(i)) for i, prompt in enumerate(once + cycle)]


def hunter(n: int, rounds: int, victim: str) -> list[Query]:
    """n + 1 prompts of one token: each the one that a copy of `victim` lacks. `rounds` * (n + 1) requests."""
    prompts = [pack([i]) for i in range(n + 1)]
    names = {block_keys(prompt, TOKEN_BYTES)[0]: i for i, prompt in enumerate(prompts)}
    lacking = n

    def note(event: CacheEvent) -> None:
        nonlocal lacking
        if isinstance(event, Removed):
            lacking = names[event.hashes[0]]

    shadow = PrefixCache(n, make_eviction(victim, rng=Random("shadow")), on_event=note)
    queries = []
    for i in range(rounds * (n + 1)):
        queries.append(Query(i, prompts[i if i <= n else lacking], arrival=float(i)))
        shadow.serve(queries[-1].prompt, float(i), query=queries[-1])
    return queries


def misses(name: str, n: int, queries: list[Query], future: Future, seed: int, skip: int) -> int:
    """Missed tokens of a policy after the first `skip` requests."""
    params = {"future": future} if name == "belady" else {}
    cache = PrefixCache(n, make_eviction(name, rng=Random(f"{seed}/{name}"), **params))
    missed = [query.length - cache.serve(query.prompt, query.arrival, query=query) for query in queries]
    return sum(missed[skip:])


def measure(
    sizes: Iterable[int],
    policies: Iterable[str],
    *,
    rounds: int = 6,
    seeds: int = 10,
    seed: int = 0,
    against: str = "cycle",
) -> list[Ratio]:
    """The ratio of each policy, the mean over `seeds` seeds where it is randomized, for each cache size.

    `against` is the adversary, one of ADVERSARIES; the hunter hunts each policy with a copy of its own.
    """
    if against not in ADVERSARIES:
        raise ValueError(f"unknown adversary {against!r}: choose one of {', '.join(ADVERSARIES)}")
    found = []
    for n in sizes:
        if n < 2:
            raise ValueError(f"sizes: a cache needs at least 2 tokens, not {n}")
        queries = trap(n, rounds) if against == "trap" else adversary(n, rounds)
        skip = len(queries) - (rounds - 1) * (n + 1)
        ratios, future, optimum = {}, None, 0
        for name in policies:
            if against == "hunter":
                queries, future = hunter(n, rounds, name), None
            if future is None:
                future = Future(queries, TOKEN_BYTES)
                optimum = misses("belady", n, queries, future, 0, skip)
            runs = seeds if name in SEEDED else 1
            cost = sum(misses(name, n, queries, future, seed + i, skip) for i in range(runs))
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
