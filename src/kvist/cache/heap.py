"""Policies that rank whole leaves: a heap of candidates, the smallest priority evicted first.

Evicting the last block of the worst leaf again and again empties that leaf before the next one, because a
priority does not change by eviction. The heap is lazy: entries of nodes that stopped being candidates stay
until they surface or outnumber the live ones. O(log n) a candidate, nothing a block.
"""

from __future__ import annotations

from abc import abstractmethod
from heapq import heapify, heappop, heappush
from random import Random
from typing import Any

from kvist.cache.base import EvictionPolicy
from kvist.prefix.tree import Node


class PriorityPolicy(EvictionPolicy):
    """Base: subclasses say `priority`, which must never fall while a node stays a candidate."""

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._heap: list[tuple[Any, int, Node]] = []
        self._next_ticket = 0
        self._live = 0

    @abstractmethod
    def priority(self, node: Node) -> Any:
        """What to compare; the smallest leaves first."""

    def portion(self, node: Node) -> int:
        """How many blocks of a leaf may go before its priority has to be looked at again."""
        return node.size

    def candidate(self, node: Node) -> None:
        self._live += 1
        self._push(node)

    def retract(self, node: Node) -> None:
        node.ticket = -1
        self._live -= 1
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapify(self._heap)

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and self._live:
            rank, ticket, node = self._heap[0]
            if node.ticket != ticket:
                heappop(self._heap)
            elif (current := self.priority(node)) != rank:
                heappop(self._heap)  # it was used while it stayed a candidate
                heappush(self._heap, (current, ticket, node))
            else:
                taken = min(self.portion(node), blocks - freed)
                self.cache.trim(node, taken)
                freed += taken
        return freed

    def reset(self) -> None:
        self._heap.clear()
        self._live = 0

    def _push(self, node: Node) -> None:
        node.ticket = self._next_ticket
        heappush(self._heap, (self.priority(node), node.ticket, node))
        self._next_ticket += 1
