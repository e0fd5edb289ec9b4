"""Marconi's eviction: recency plus the prefill work that a leaf saves per byte.

Utility = recency + alpha * FLOP efficiency, both scaled to 0 … 1 over the leaves there are. In a model with
attention alone every token takes the same bytes, and what a token saves grows with its position (attention
to all before it), so a leaf's efficiency is the mean position of its tokens. alpha is 0 (LRU) until the cache
was full for some time; then the requests seen so far are replayed with each alpha of a grid, and the one with
the most hits stays.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from random import Random

from kvist.cache.base import EvictionPolicy
from kvist.cache.cache import PrefixCache
from kvist.model import Query
from kvist.prefix.tree import Node

GRID = (0.0, 0.1, 0.3, 1.0, 3.0)
BOOTSTRAP = 5  # times the requests before the first eviction, to collect before alpha is chosen
MOST = 1000  # requests collected, however long that takes


class Marconi(EvictionPolicy):
    """node.last: last use; node.born: blocks up to the node's start."""

    name = "marconi"
    description = "Recency plus prefill work saved per byte; their weight is fitted once by replay."
    source = (
        "Pan et al., MLSys 2025 (arXiv 2411.19379). On a tree without recurrent layers: all is admitted, "
        "only leaves go; hosts that hand over no queries keep alpha as given"
    )
    params = {"alpha": "weight of the work saved (fitted by replay)"}

    def __init__(self, *, alpha: float | None = None, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        if alpha is not None and alpha < 0:
            raise ValueError(f"alpha must be at least 0, not {alpha}")
        self._given = alpha
        self._forget()

    def _forget(self) -> None:
        self.alpha = self._given or 0.0
        self._leaves: dict[Node, None] = {}
        self._seen: list[tuple[bytes, float, bytes]] | None = [] if self._given is None else None
        self._collect = MOST
        self._found: list[Node] | None = None  # leaves that appear while victims are taken

    reset = _forget

    def begin(self, query: Query | None, now: float) -> None:
        if self._seen is None or query is None:
            return
        if len(self._seen) >= self._collect:
            self._fit(self._seen)
            self._seen = None
        else:
            self._seen.append((query.prompt, now, query.salt))

    def hit(self, node: Node, now: float) -> None:
        node.last = now

    touch = hit

    def insert(self, node: Node, now: float) -> None:
        node.last = now
        parent = node.parent
        assert parent is not None
        node.born = parent.born + parent.size

    def split(self, upper: Node, lower: Node) -> None:
        upper.last, upper.born = lower.last, lower.born
        lower.born += upper.size

    def candidate(self, node: Node) -> None:
        self._leaves[node] = None
        if self._found is not None:
            self._found.append(node)

    def retract(self, node: Node) -> None:
        del self._leaves[node]

    def evict(self, blocks: int) -> int:
        """One look at all leaves a call, as Marconi does; their scales hold for the call."""
        if self._seen is not None and self._collect == MOST:
            self._collect = min(BOOTSTRAP * max(len(self._seen), 1), MOST - 1)
        if not self._leaves:
            return 0
        last = [node.last for node in self._leaves]
        work = [node.born + node.size / 2 for node in self._leaves]
        oldest, newest, least, most = min(last), max(last), min(work), max(work)
        by_age, by_work = 1 / ((newest - oldest) or 1.0), self.alpha / ((most - least) or 1.0)

        def utility(node: Node) -> float:
            return (node.last - oldest) * by_age + (node.born + node.size / 2 - least) * by_work

        heap = [(utility(node), i, node) for i, node in enumerate(self._leaves)]
        heapify(heap)
        freed, ticket = 0, len(heap)
        while freed < blocks and heap:
            self._found = []
            node = heappop(heap)[2]
            taken = min(node.size, blocks - freed)
            self.cache.trim(node, taken)
            freed += taken
            for leaf in self._found:
                heappush(heap, (utility(leaf), ticket, leaf))
                ticket += 1
        self._found = None
        return freed

    def _fit(self, seen: list[tuple[bytes, float, bytes]]) -> None:
        best = -1
        for alpha in GRID:
            cache = PrefixCache(
                self.cache.capacity,
                Marconi(alpha=alpha),
                block_size=self.cache.block_size,
                unit=self.cache.stride // self.cache.block_size,
            )
            hits = sum(cache.serve(prompt, now, salt) for prompt, now, salt in seen)
            if hits > best:
                best, self.alpha = hits, alpha
