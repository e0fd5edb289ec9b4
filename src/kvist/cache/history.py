"""What was asked for lately, cached or not: a radix tree of records, and the phases of the request sequence.

Every cached node has one node here that starts where it starts and holds at least its blocks (`Record.cached`
is the way back); the other nodes are ghosts, metadata of blocks that were evicted. Ghosts make the learning
uncensored and the phases exact: a *phase* is a maximal run of block requests with at most n distinct blocks,
n the cache's size, whatever the cache holds. A request that begins a phase in its middle counts as asked for
again from its start (its blocks are all cached while it is served, so that costs nobody a miss).

A request of a block is *clean* if neither this phase nor the previous one has asked for it before. Blocks of
these two phases are never forgotten; of the rest, those used longest ago go first.
"""

from __future__ import annotations

from typing import Any

from kvist.cache.reuse import RING, ReuseCounts
from kvist.prefix.tree import Node, RadixTree

MEMORY = 32  # distinct blocks remembered, in cache sizes


class Record:
    """What is known of a node. Its class and epoch are those of its last use."""

    __slots__ = ("cached", "epoch", "hits", "key", "kind", "phase", "pool")

    def __init__(self) -> None:
        self.kind = -1  # class
        self.epoch = 0
        self.phase = -1
        self.hits = 0  # requests after the first
        self.cached: Node | None = None
        self.key: tuple[int, int] | None = None  # the policy's bucket, while `cached` is a candidate
        self.pool: Any = None  # the policy's pool and place in it


class _Silent:
    """The history has no policy of its own."""

    def _ignore(self, *nodes: Node) -> None:
        pass

    split = candidate = retract = remove = settle = _ignore


class History:
    """The tree, in blocks of `stride` bytes, for a cache of `size` blocks; keeps `counts` up to date."""

    def __init__(self, stride: int, size: int, counts: ReuseCounts) -> None:
        self.counts = counts
        self.tree = RadixTree(stride, _Silent())
        self.tree.root.state = Record()
        self.size = size
        self.phase = 0
        self.distinct = 0  # blocks asked for in this phase
        self.clean = 0  # blocks of the current phase that the previous one had not asked for
        self.floor = 0  # ghosts last used before this epoch are forgotten
        self._by_epoch: dict[int, list[Node]] = {}
        self._kept: list[Node] = []  # old ghosts of the last two phases

    def room(self, node: Node) -> int:
        """How many blocks of `node` this phase can still take."""
        return node.size if node.state.phase == self.phase else self.size - self.distinct

    def ask(self, node: Node) -> bool:
        """All of `node` is asked for, which `room` allows; True if that is clean."""
        record: Record = node.state
        if record.phase == self.phase:
            return False
        clean = record.phase < self.phase - 1 or record.phase < 0
        if clean:
            self.clean += node.size
        self.distinct += node.size
        record.phase = self.phase
        return clean

    def begin_phase(self, above: Node) -> None:
        """A new phase, begun by a request that has come as far as `above`, whose path it asks for again."""
        self.phase += 1
        self.distinct = self.clean = 0
        node = above
        while node.parent is not None:
            node.state.phase = self.phase
            self.distinct += node.size
            node = node.parent
        kept, self._kept = self._kept, []
        for old in kept:
            self.release(old)

    def use(self, node: Node) -> None:
        """`node` was asked for again; `classify` follows."""
        record = node.state
        self.counts.used(record.kind, record.epoch, node.size)
        record.hits += 1

    def classify(self, node: Node, kind: int) -> None:
        """`node` was used in this epoch, as a block of class `kind`."""
        record, counts = node.state, self.counts
        epoch = counts.epoch
        moved = record.epoch != epoch or record.kind < 0
        if not moved and record.kind == kind:
            return
        if record.kind >= 0:
            counts.add(record.kind, record.epoch, -node.size)
        counts.add(kind, epoch, node.size)
        record.kind, record.epoch = kind, epoch
        if moved:
            self._list(node)

    def split(self, node: Node, blocks: int) -> Node:
        upper = self.tree.split(node, blocks)
        record, above = node.state, Record()
        above.kind, above.epoch, above.phase = record.kind, record.epoch, record.phase
        above.hits = record.hits
        upper.state = above
        self._list(upper)
        return upper

    def append(self, parent: Node, key: bytes, first: bytes) -> Node:
        """A new node below `parent`; `first` is its name there (the root's names carry a salt)."""
        tree = self.tree
        salt = first[: len(first) - tree.stride]
        node = tree.append(parent, key, 0, len(key), salt)
        node.state = Record()
        return node

    def forget(self) -> None:
        """Drop what is too much or too old. O(1) amortised per use of a node."""
        epoch, limit = self.counts.epoch, MEMORY * self.size
        while self.floor < epoch and (self.tree.total > limit or self.floor <= epoch - RING):
            self.floor += 1
            for node in reversed(self._by_epoch.pop(self.floor - 1, ())):
                self.release(node)

    def release(self, node: Node) -> None:
        """Drop `node` if it is an old ghost without children, and ancestors for which that makes it true."""
        at: Node = node
        while at.state is not None and at.state.epoch < self.floor and at.parent is not None:
            record, parent = at.state, at.parent
            if record.cached is not None or at.children:
                return
            if record.phase >= self.phase - 1:
                self._kept.append(at)
                return
            self.counts.lost(record.kind, record.epoch, at.size)
            self.tree.total -= at.size
            del parent.children[at.first]
            at.parent = at.state = None
            at = parent

    def _list(self, node: Node) -> None:
        self._by_epoch.setdefault(node.state.epoch, []).append(node)
