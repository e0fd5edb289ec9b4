"""LHD, least hit density: of a few random leaves evict the one with the fewest hits to expect per block-time.

Ages count blocks served since the last use, in steps of a 32nd of the cache, up to AGES steps; a class is the
age at which a node was used last (its own, log scale), so that nodes used again soon and late are told apart.
"""

from __future__ import annotations

from random import Random

import numpy as np

from kvist.cache.base import EvictionPolicy
from kvist.cache.cache import PrefixCache
from kvist.model import Query
from kvist.prefix.tree import Node

AGES = 128
CLASSES = 9  # new; last reuse at age 0, 1, 2-3, 4-7, …, 64 and over
SAMPLE = 32
FADE = 0.9


class LHD(EvictionPolicy):
    """node.born: blocks served at the last use; node.mark: class; node.ticket: place among the candidates."""

    name = "lhd"
    description = "Of 32 random leaves evict the one with the least hit density, learned by age and class."
    source = (
        "Beckmann, Chen, Cidon, NSDI 2018. On a tree: leaves, all blocks of one size; age steps fixed to the "
        "cache's size; no explorer"
    )

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._leaves: list[Node] = []

    def attach(self, cache: PrefixCache) -> None:
        super().attach(cache)
        self.reset()

    def reset(self) -> None:
        self._leaves.clear()
        self._clock = 0.0
        self._step = max(self.cache.capacity_blocks / 32, 1.0)
        self._hits = np.zeros((CLASSES, AGES))
        self._evictions = np.zeros((CLASSES, AGES))
        self._next = float(self.cache.capacity_blocks)
        # Before anything is known: the older, the less dense.
        self.density = [[1 / (age + 1) for age in range(AGES)] for _ in range(CLASSES)]

    def begin(self, query: Query | None, now: float) -> None:
        if self._clock >= self._next:
            self._next = self._clock + self.cache.capacity_blocks
            self._learn()

    def hit(self, node: Node, now: float) -> None:
        age = self._age(node)
        self._hits[node.mark, age] += node.size
        node.mark = min(1 + age.bit_length(), CLASSES - 1)
        node.born = self._clock
        self._clock += node.size

    def insert(self, node: Node, now: float) -> None:
        node.mark, node.born = 0, self._clock
        self._clock += node.size

    def split(self, upper: Node, lower: Node) -> None:
        upper.mark, upper.born = lower.mark, lower.born

    def candidate(self, node: Node) -> None:
        node.ticket = len(self._leaves)
        self._leaves.append(node)

    def retract(self, node: Node) -> None:
        last = self._leaves.pop()
        if last is not node:
            self._leaves[node.ticket] = last
            last.ticket = node.ticket

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and self._leaves:
            node = min(self._drawn(), key=lambda n: self.density[n.mark][self._age(n)])
            taken = min(node.size, blocks - freed)
            self._evictions[node.mark, self._age(node)] += taken
            self.cache.trim(node, taken)
            freed += taken
        return freed

    def _drawn(self) -> list[Node]:
        leaves, random = self._leaves, self.rng.random
        if len(leaves) <= SAMPLE:
            return leaves
        return [leaves[int(random() * len(leaves))] for _ in range(SAMPLE)]

    def _age(self, node: Node) -> int:
        return min(int((self._clock - node.born) / self._step), AGES - 1)

    def _learn(self) -> None:
        """density(age) = hits from this age on / blocks' time from this age on (the paper's section 3)."""
        ends = self._hits + self._evictions
        hits = np.cumsum(self._hits[:, ::-1], axis=1)
        lifetimes = np.cumsum(np.cumsum(ends[:, ::-1], axis=1), axis=1)
        density = hits / np.maximum(lifetimes, 1e-9)
        self.density = density[:, ::-1].tolist()
        self._hits *= FADE
        self._evictions *= FADE
