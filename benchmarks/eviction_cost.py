"""What one eviction call costs: policies of kvist against leaf-LRU as SGLang 0.4.6 does it.

    python benchmarks/eviction_cost.py [--free 3000] [--calls 60]

The baseline walks the whole tree for its leaves on every call, heapifies them by last access and pops whole
leaves, the last one in part. All caches of a row are full and were served the same prompts; the policies'
calls alternate in one run, and what a call freed is filled again before the next.
"""

from __future__ import annotations

import argparse
import heapq
from random import Random
from statistics import median
from time import perf_counter

import numpy as np

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.base import EvictionPolicy
from kvist.model import pack
from kvist.prefix.tree import Node


class FullWalkLRU(EvictionPolicy):
    """Leaf-LRU by a heap over a full tree walk per call, the rule of SGLang 0.4.6's RadixCache.evict."""

    name = "full-walk-lru"
    description = "baseline"
    source = "SGLang 0.4.6 mem_cache/radix_cache.py, rewritten"

    def hit(self, node: Node, now: float) -> None:
        node.last = now

    touch = insert = hit

    def split(self, upper: Node, lower: Node) -> None:
        upper.last = lower.last

    def evict(self, blocks: int) -> int:
        leaves, stack = [], list(self.cache.tree.root.children.values())
        while stack:
            node = stack.pop()
            if node.children:
                stack.extend(node.children.values())
            elif not node.locks:
                leaves.append((node.last, id(node), node))
        heapq.heapify(leaves)
        freed = 0
        while freed < blocks and leaves:
            _, _, node = heapq.heappop(leaves)
            parent, taken = node.parent, min(node.size, blocks - freed)
            self.cache.trim(node, taken)
            freed += taken
            if not node.size and parent is not None and not parent.children and not parent.locks:
                heapq.heappush(leaves, (parent.last, id(parent), parent))
        return freed


def policies() -> dict[str, EvictionPolicy]:
    return {
        "full-walk-lru": FullWalkLRU(),
        "l-lru": make_eviction("l-lru"),
        "rlt": make_eviction("rlt", rng=Random(1)),
        "hedge": make_eviction("hedge", rng=Random(1)),
    }


def measure(tokens: int, nodes: int, free: int, calls: int) -> dict[str, float]:
    """Median ms per call to free `free` tokens in a full cache of about `nodes` nodes."""
    length = max(tokens // nodes, 2)
    times: dict[str, list[float]] = {}
    caches = {name: PrefixCache(tokens, policy) for name, policy in policies().items()}
    bulk = np.random.Generator(np.random.PCG64(5))

    def fresh() -> list[bytes]:
        """Prompts of `free` tokens in all, in pieces of the row's node length."""
        tokens = pack(bulk.integers(0, 2**32, size=free, dtype=np.uint32))
        step = 4 * min(length, free)
        return [tokens[i : i + step] for i in range(0, len(tokens), step)]

    filling = []
    while sum(map(len, filling)) // 4 < tokens + free:
        filling += fresh()
    for now, piece in enumerate(filling):
        for cache in caches.values():
            cache.serve(piece, now)
    for call in range(calls):
        pieces = fresh()
        for name, cache in caches.items():
            start = perf_counter()
            freed = cache.evict(free)
            times.setdefault(name, []).append(perf_counter() - start)
            assert freed == free
            for i, piece in enumerate(pieces):
                cache.serve(piece, 1e6 + call + i * 1e-4)
    return {name: median(values) * 1e3 for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--free", type=int, default=3000, help="tokens to free per call")
    parser.add_argument("--calls", type=int, default=60)
    args = parser.parse_args()
    names = list(policies())
    print(f"median ms per eviction call that frees {args.free} tokens, page size 1\n")
    ratios = ("rlt", "hedge")
    head = "".join(f"{name:>15}" for name in names) + "".join(f"{name + ' / walk':>14}" for name in ratios)
    print(f"{'tokens':>9} {'nodes':>7} " + head)
    for tokens in (200_000, 1_000_000):
        for nodes in (100, 10_000):
            cost = measure(tokens, nodes, args.free, args.calls)
            row = "".join(f"{cost[name]:15.3f}" for name in names)
            row += "".join(f"{cost[name] / cost['full-walk-lru']:14.3f}" for name in ratios)
            print(f"{tokens:>9} {nodes:>7} {row}")


if __name__ == "__main__":
    main()
