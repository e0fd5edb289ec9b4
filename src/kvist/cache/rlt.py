"""RLT, randomized leaf token eviction (paper section 2), and its unmarked half, random-leaf.

RLT is a marking algorithm on the tree. Tokens of a served query, hit or inserted, are marked. Room is made by
evicting uniformly random *unmarked* leaf tokens. When none is left, a new phase begins: all marks are cleared
but those of the query being served. Expected competitive ratio O(log n), n = cache size in tokens, where
leaf-LRU's is Omega(n).

A node carries the number of the phase in which it was last marked, so clearing all marks is one addition.
Unmarked candidates live in a sampler, marked ones beside it; each candidate changes sides at most once a
phase, so an evicted token costs O(1) amortised.
"""

from __future__ import annotations

from random import Random

from kvist.cache.sampler import SampledPolicy
from kvist.model import Query
from kvist.prefix.tree import Node


class RandomLeaf(SampledPolicy):
    name = "random-leaf"
    description = "Evict uniformly random leaf tokens, without marks."
    source = "RLT without its marking, for comparison (paper section 2)"

    def candidate(self, node: Node) -> None:
        self.sampler.add(node)

    def retract(self, node: Node) -> None:
        self.sampler.discard(node)

    def evict(self, blocks: int) -> int:
        return self.draw(blocks)


class RLT(SampledPolicy):
    name = "rlt"
    description = "Evict uniformly random unmarked leaf tokens, in phases: O(log n)-competitive."
    source = "paper section 2 (arXiv 2601.18999)"

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._clear()

    def _clear(self) -> None:
        self.phase = 0
        self._marked = 0
        self._marked_leaves: dict[Node, None] = {}
        self._serving: list[Node] = []

    @property
    def marked(self) -> int:
        """Marked tokens in the cache."""
        return self._marked * self.cache.block_size

    def begin(self, query: Query | None, now: float) -> None:
        self._serving.clear()

    def hit(self, node: Node, now: float) -> None:
        self._serving.append(node)
        self._mark(node)

    def touch(self, node: Node, now: float) -> None:
        self._mark(node)

    def insert(self, node: Node, now: float) -> None:
        self._mark(node)

    def split(self, upper: Node, lower: Node) -> None:
        super().split(upper, lower)
        upper.mark = lower.mark

    def candidate(self, node: Node) -> None:
        if node.mark == self.phase:
            self._marked_leaves[node] = None
        else:
            self.sampler.add(node)

    def retract(self, node: Node) -> None:
        if node.slot >= 0:
            self.sampler.discard(node)
        else:
            del self._marked_leaves[node]

    def evict(self, blocks: int) -> int:
        freed = self.draw(blocks)
        while freed < blocks and self._marked_leaves:
            self._begin_phase()
            if not len(self.sampler):
                # All that is left are unlocked leaves of a query that matched and was not admitted.
                self._serving.clear()
                self._begin_phase()
            freed += self.draw(blocks - freed)
        return freed

    def reset(self) -> None:
        super().reset()
        self._clear()

    def _mark(self, node: Node) -> None:
        if node.mark == self.phase:
            return
        node.mark = self.phase
        if node.slot >= 0:
            self.sampler.discard(node)
            self._marked_leaves[node] = None
        self._marked += node.size

    def _begin_phase(self) -> None:
        self.phase += 1
        self._marked = 0
        leaves, self._marked_leaves = self._marked_leaves, {}
        for node in self._serving:
            if node.parent is not None:
                self._mark(node)
        for node in leaves:
            self.candidate(node)
