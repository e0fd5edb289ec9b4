"""Queues with a second chance: sieve and s3-fifo, on leaves.

Their objects are nodes. A node's place in its queue stays while it is an inner node or locked; only leaves
are met by the hand or at the queue's end, the others are passed over untouched.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from heapq import heappop, heappush
from random import Random

from kvist.cache.base import EvictionPolicy
from kvist.cache.heap import PriorityPolicy
from kvist.prefix.tree import Node

MOST = 3  # uses that s3-fifo counts up to


class Sieve(PriorityPolicy):
    """node.born: place in the queue; node.hits: 1 if used since the hand passed; node.mark: sweep it is due.

    The hand runs from the oldest to the newest and starts again: a leaf behind the hand is due in the next
    sweep, so the order of sweeps and places is the hand's way.
    """

    name = "sieve"
    description = "A hand sweeps the leaves, oldest first, sparing once those used since it last passed."
    source = "Zhang et al., NSDI 2024. On a tree: leaves; the split front of a node shares its place"

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self._place = 0
        self._hand = (0, -1.0)  # sweep and place of the hand

    def hit(self, node: Node, now: float) -> None:
        node.hits = 1

    def insert(self, node: Node, now: float) -> None:
        self._place += 1
        node.born = self._place

    def split(self, upper: Node, lower: Node) -> None:
        upper.born, upper.hits = lower.born, lower.hits

    def candidate(self, node: Node) -> None:
        sweep, place = self._hand
        node.mark = sweep + (node.born <= place)
        super().candidate(node)

    def priority(self, node: Node) -> tuple[int, float]:
        return node.mark, node.born

    def portion(self, node: Node) -> int:
        self._hand = (node.mark, node.born)
        if node.hits:
            node.hits = 0
            node.mark += 1
            return 0
        return node.size


class S3FIFO(EvictionPolicy):
    """node.born: place in its queue; node.hits: uses, up to MOST; node.mark: 0 in the small queue, 1 in main.

    node.state: digest of the path to the node's first block, by which the ghost queue knows it again.
    """

    name = "s3-fifo"
    description = "A small queue for the new, a main queue for what was used there, a ghost queue behind."
    source = "Yang et al., SOSP 2023. On a tree: leaves; sizes in blocks; ghosts by path"
    params = {"small": "share of the cache for the small queue (0.1)"}

    def __init__(self, *, small: float = 0.1, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        if not 0 < small < 1:
            raise ValueError(f"small must lie between 0 and 1, not {small}")
        self.small = small
        self.reset()

    def reset(self) -> None:
        self._heaps: tuple[list[tuple[float, int, Node]], ...] = ([], [])  # small, main
        self._live = [0, 0]
        self._place = self._ticket = 0
        self._small_blocks = 0
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        self._ghost_blocks = 0

    def hit(self, node: Node, now: float) -> None:
        node.hits = min(node.hits + 1, MOST)

    def insert(self, node: Node, now: float) -> None:
        parent = node.parent
        assert parent is not None
        above = parent.state or b""
        node.state = blake2b(above + node.first[-self.cache.stride :], digest_size=8).digest()
        if parent.parent is None:  # the salt is part of a root child's name
            node.state = blake2b(node.first, digest_size=8).digest()
        known = self._ghosts.pop(node.state, None)
        node.mark = int(known is not None)
        if known is None:
            self._small_blocks += node.size
        else:
            self._ghost_blocks -= known
        self._place += 1
        node.born = self._place

    def split(self, upper: Node, lower: Node) -> None:
        upper.born, upper.hits, upper.mark, upper.state = lower.born, lower.hits, lower.mark, lower.state
        lower.state = blake2b(upper.state + lower.first, digest_size=8).digest()

    def candidate(self, node: Node) -> None:
        self._ticket += 1
        node.ticket = self._ticket
        self._live[node.mark] += 1
        heappush(self._heaps[node.mark], (node.born, node.ticket, node))

    def retract(self, node: Node) -> None:
        node.ticket = -1
        self._live[node.mark] -= 1

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and (self._live[0] or self._live[1]):
            quota = self.small * self.cache.capacity_blocks
            queue = 0 if self._live[0] and (self._small_blocks > quota or not self._live[1]) else 1
            _, ticket, node = self._heaps[queue][0]
            if node.ticket != ticket:
                heappop(self._heaps[queue])
            elif queue == 0 and node.hits > 1:
                self._requeue(node)
                self._small_blocks -= node.size
                node.hits = 0
            elif queue == 1 and node.hits:
                self._requeue(node)
                node.hits -= 1
            else:
                freed += self._take(node, min(node.size, blocks - freed))
        return freed

    def _requeue(self, node: Node) -> None:
        """To the head of the main queue."""
        self.retract(node)
        self._place += 1
        node.born, node.mark = self._place, 1
        self.candidate(node)

    def _take(self, node: Node, blocks: int) -> int:
        if not node.mark:
            self._small_blocks -= blocks
            gone = self._ghosts.pop(node.state, 0) + blocks
            self._ghosts[node.state] = gone
            self._ghost_blocks += blocks
            while self._ghost_blocks > (1 - self.small) * self.cache.capacity_blocks:
                self._ghost_blocks -= self._ghosts.popitem(last=False)[1]
        self.cache.trim(node, blocks)
        return blocks
