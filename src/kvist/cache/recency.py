"""Policies over when and how often a node was used: l-lru, fifo, l-lfu, slru, lru-k."""

from __future__ import annotations

from math import inf

from kvist.cache.heap import PriorityPolicy
from kvist.prefix.tree import Node


class UsagePolicy(PriorityPolicy):
    """Keeps, per node, birth, last use and hit count."""

    def hit(self, node: Node, now: float) -> None:
        node.last = now
        node.hits += 1

    def touch(self, node: Node, now: float) -> None:
        node.last = now

    def insert(self, node: Node, now: float) -> None:
        node.born = node.last = now

    def split(self, upper: Node, lower: Node) -> None:
        upper.born, upper.last, upper.hits = lower.born, lower.last, lower.hits


class LeafLRU(UsagePolicy):
    name = "l-lru"
    description = "Evict the least recently used leaf: the default of SGLang and, in effect, of vLLM."
    source = "SGLang mem_cache/evict_policy.py LRUStrategy; paper section 2"

    def priority(self, node: Node) -> float:
        return node.last


class FIFO(UsagePolicy):
    name = "fifo"
    description = "Evict the leaf that was inserted first."
    source = "SGLang mem_cache/evict_policy.py FIFOStrategy"

    def priority(self, node: Node) -> float:
        return node.born


class LeafLFU(UsagePolicy):
    name = "l-lfu"
    description = "Evict the leaf with the fewest hits, the least recently used among equals."
    source = "SGLang mem_cache/evict_policy.py LFUStrategy"

    def priority(self, node: Node) -> tuple[int, float]:
        return node.hits, node.last


class SLRU(UsagePolicy):
    name = "slru"
    description = "Segmented LRU: leaves with fewer hits than the threshold go before the protected ones."
    source = "SGLang mem_cache/evict_policy.py SLRUStrategy"
    params = {"protect_after": "hits that make a node protected (2)"}

    def __init__(self, *, protect_after: int = 2, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if protect_after < 1:
            raise ValueError(f"protect_after must be at least 1 hit, not {protect_after}")
        self.protect_after = protect_after

    def priority(self, node: Node) -> tuple[bool, float]:
        return node.hits >= self.protect_after, node.last


class LRUK(UsagePolicy):
    """`node.state` holds the node's last k uses, the latest first; it goes when the node goes."""

    name = "lru-k"
    description = "Evict the leaf whose k-th last use is furthest back; fewer uses than k go first."
    source = (
        "O'Neil, O'Neil, Weikum, SIGMOD 1993. On a tree: leaves; the uses of evicted nodes are not retained, "
        "every request is its own (no correlated reference period)"
    )
    params = {"k": "uses looked back (2)"}

    def __init__(self, *, k: int = 2, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self.k = k

    def hit(self, node: Node, now: float) -> None:
        super().hit(node, now)
        node.state = (now, *node.state[: self.k - 1])

    def insert(self, node: Node, now: float) -> None:
        super().insert(node, now)
        node.state = (now,)

    def split(self, upper: Node, lower: Node) -> None:
        super().split(upper, lower)
        upper.state = lower.state

    def priority(self, node: Node) -> tuple[float, float]:
        return (node.state[-1] if len(node.state) == self.k else -inf), node.last
