"""The offline optimum: evict the leaf block whose next use lies furthest ahead.

A block is used whenever any block behind it is, so the furthest next use in the whole cache is always that
of some leaf block: Belady's rule and the leaf constraint never conflict, and the rule is optimal among
policies that, like all of ours, cache what they serve.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable
from math import inf
from random import Random

from kvist.cache.base import EvictionPolicy
from kvist.cache.cache import PrefixCache
from kvist.cache.heap import PriorityPolicy
from kvist.model import Query
from kvist.prefix.tree import Node, RadixTree


class Future:
    """All requests to come, as a tree: `times` of a node are the requests that use its last block.

    Built once from the whole workload and shared by any number of caches with the same block size.
    """

    def __init__(self, queries: Iterable[Query], stride: int) -> None:
        self.stride = stride
        self.order: dict[Hashable, int] = {}
        self.tree = RadixTree(stride, _Silent())
        for time, query in enumerate(queries):
            self.order[query.id] = time
            self._add(query, time)

    def _add(self, query: Query, time: int) -> None:
        tree, prompt = self.tree, query.prompt
        walk = tree.walk(prompt, query.salt)
        path, offset = walk.path, walk.offset
        if walk.part:
            assert walk.partial is not None
            upper = tree.split(walk.partial, walk.part)
            upper.state = list(walk.partial.state)
            path.append(upper)
            offset += walk.part * self.stride
        for node in path:
            node.state.append(time)
        end = len(prompt) - len(prompt) % self.stride
        if offset < end:
            leaf = tree.append(path[-1] if path else tree.root, prompt, offset, end, query.salt)
            leaf.state = [time]


class _Silent(EvictionPolicy):
    """The future's tree has no policy."""

    def evict(self, blocks: int) -> int:
        raise NotImplementedError("the future is never evicted")


class Belady(PriorityPolicy):
    name = "belady"
    description = "Offline optimum: evict the leaf block whose next use is furthest ahead."
    source = "Belady 1966; given the future by the simulator"
    params = {"future": "kvist.cache.belady.Future of the whole workload"}

    def __init__(self, *, future: Future, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self.future = future
        self._time = -1

    def attach(self, cache: PrefixCache) -> None:
        if cache.stride != self.future.stride:
            raise ValueError("belady: the future was built for another block size")
        super().attach(cache)

    def begin(self, query: Query | None, now: float) -> None:
        if query is None or query.id not in self.future.order:
            raise ValueError("belady: a request that is not in the future it was given")
        self._time = self.future.order[query.id]

    def insert(self, node: Node, now: float) -> None:
        """Cut the new node where the future branches, so that every piece has one next use.

        node.state = (the future's node that the cached node lies in, blocks of it before the cached node).
        """
        parent = node.parent
        assert parent is not None
        future = self.future.tree
        at, start = parent.state or (future.root, 0)
        start += parent.size
        while True:
            if start == at.size:
                at = at.children[node.first if at is future.root else node.key[: future.stride]]
                start = 0
            if node.size <= at.size - start:
                node.state = (at, start)
                return
            self.cache.tree.split(node, at.size - start).state = (at, start)
            start = at.size

    def split(self, upper: Node, lower: Node) -> None:
        if lower.state is not None:
            at, start = lower.state
            upper.state, lower.state = (at, start), (at, start + upper.size)

    def priority(self, node: Node) -> float:
        times = node.state[0].state
        after = bisect_right(times, self._time)
        return -(times[after] if after < len(times) else inf)
