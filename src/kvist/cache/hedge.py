"""Hedge: evict by learned hit density, and by chance where that has misled; O(log n)-competitive.

*Trust.* Every leaf belongs to a class and was last used in some epoch; all leaves of a class and epoch have
one rank, their hit density (cache/hazard.py). The lowest rank leaves first, the least recently used of a
class before the others. A class is what the tree shows of a block when it is used:

- on the way of a request, from its end upward, as long as all but one of the requests that reached a node
  went on to the next (a *line*: a conversation, or a fresh tail): the number of requests in the line, whether
  it starts at the root, and how long the request's last piece is;
- above that (a *template*): the number of requests.

*Marking.* A phase is a maximal run of block requests with at most n distinct blocks. Where trust costs more
than H_n misses for each clean block of the phases, the rest of the phase is played like RLT: first evict what
neither this phase nor the one before has asked for, then uniformly random leaf blocks that this phase has not
asked for. docs/theory.md says why that keeps RLT's bound up to a constant.

Classes, epochs and phases live in a history that outlives eviction (cache/history.py).
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapify, heappop, heappush
from math import prod
from random import Random
from typing import TYPE_CHECKING

from kvist.cache.base import EvictionPolicy
from kvist.cache.hazard import HazardTable
from kvist.cache.history import History, Record
from kvist.cache.pools import Pools
from kvist.model import Query
from kvist.prefix.tree import Node, common_prefix

if TYPE_CHECKING:
    from kvist.cache.cache import PrefixCache

EPOCHS = 16  # epochs in which a cache's worth of blocks is served
HORIZONS = (EPOCHS, 4 * EPOCHS, 16 * EPOCHS)
SLACK = 4  # unspent trust that a phase may take over, in longest requests

_COUNTS = [0, 0, 1, 2, 3, 4, 5, 6, 7, *[8] * 4, *[9] * 8]  # requests of a line, by 0 … 16; more: 10
_HITS = [0, 1, 2, 3, 4, 4, 5, 5, 5, *[6] * 7, *[7] * 16]  # requests of a template; more: 8
_SIZES = (0.06, 0.2, 0.5, 1.0, 2.0, 4.0)
_LINE, _TEMPLATE = (11, 2, 7), (9,)
_TEMPLATES = prod(_LINE)  # the first class of the second grid


class Hedge(EvictionPolicy):
    name = "hedge"
    description = "Evict by hit density learned online, by chance where it misleads: O(log n)-competitive."
    source = "kvist; after LHD (Beckmann et al., NSDI 2018), learning-augmented marking, and RLT"

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)

    def attach(self, cache: PrefixCache) -> None:
        super().attach(cache)
        self.reset()

    def reset(self) -> None:
        size = self.cache.capacity_blocks
        self.table = HazardTable((_LINE, _TEMPLATE), HORIZONS)
        self.counts = self.table.counts
        self.history = History(self.cache.stride, size, self.counts)
        self._clock = 0  # blocks served
        self._epoch_length = max(size // EPOCHS, 1)
        self._requests, self._learn_at = 0, 8
        self._end: Node | None = None  # where the request being served ends, in the history
        self._buckets: dict[tuple[int, int], dict[Node, None]] = {}  # leaves by class and epoch
        self._heap: list[tuple[float, int, int]] = []  # (rank, epoch, class)
        self._changes = 0  # of leaves, since the heap was built
        self._pieces = self._piece_blocks = 0
        self.harmonic = sum(1 / k for k in range(1, size + 1))
        self.marking = False
        self.budget = 0.0  # misses that trust may still cost
        self._asked = self._longest = 0  # blocks of the request being served, of the longest one lately
        self._pools = Pools()

    # What the cache tells.

    def begin(self, query: Query | None, now: float) -> None:
        self._classify()
        self._requests += 1
        self.counts.served()
        self._longest = max(self._longest, self._asked)
        self._asked = 0
        epoch = self._clock // self._epoch_length
        if epoch != self.counts.epoch:
            self.counts.epoch = epoch
            self.history.forget()
            if self._changes >= len(self._buckets):
                self._order()
        if self._requests >= self._learn_at:
            self.table.learn()
            self._learn_at = self._requests + min(self._requests // 16, 128)
            self._order()

    def hit(self, node: Node, now: float) -> None:
        here = node.state
        if here.size > node.size:
            here = self._cut(node, node.size)
        room = self.history.room(here)
        if room < here.size:
            if room > 0:
                self.cache.tree.split(node, room)  # `node` keeps the rest
                self._ask(here.parent, 0)
                self._use(here.parent)
            self._begin_phase(here.parent)
        self._ask(here, 0)
        self._use(here)

    def insert(self, node: Node, now: float) -> None:
        """Cut the new node, and the history, so that each piece lies in one record; all of it was missed."""
        tree, history, stride = self.cache.tree, self.history, self.cache.stride
        parent = node.parent
        assert parent is not None
        at = history.tree.root if parent.parent is None else parent.state
        if parent.parent is not None and at.size > parent.size:
            at = self._cut(parent, parent.size)
        if at is not self._end:  # the request before did not end here
            self._classify()
        while True:
            ghost = at.children.get(node.first if at is history.tree.root else node.key[:stride])
            limit = history.size - history.distinct
            if ghost is None:
                blocks = min(node.size, limit)
                if blocks:
                    here = history.append(at, node.key[: blocks * stride], node.first)
            else:
                span = min(ghost.size, node.size) * stride
                blocks = common_prefix(node.key, 0, ghost.key, span) // stride
                if ghost.state.phase != history.phase:
                    blocks = min(blocks, limit)
                if blocks:
                    here = history.split(ghost, blocks) if blocks < ghost.size else ghost
            if not blocks:
                self._begin_phase(at)
                continue
            piece = tree.split(node, blocks) if blocks < node.size else node
            piece.state, here.state.cached = here, piece
            self._ask(here, blocks)
            if ghost is None:
                self._clock += blocks
                self._pieces += 1
                self._piece_blocks += blocks
                self.history.classify(here, self._line(1, here, here))
            else:
                self._use(here)
            if piece is node:
                break
            at = here
        self._end = here
        self._classify()
        if self.budget < 0 and not self.marking:
            self._begin_marking()

    def split(self, upper: Node, lower: Node) -> None:
        if lower.state is not None:  # None: `insert` is cutting a new node
            self._link(upper, self.history.split(lower.state, upper.size))

    def candidate(self, node: Node) -> None:
        self._changes += 1
        self._file(node)
        if self.marking:
            self._pools.join(node, self.history.phase)

    def retract(self, node: Node) -> None:
        if node.state.state.key is not None:
            self._unfile(node)
        self._pools.leave(node)

    def remove(self, node: Node) -> None:
        here = node.state
        here.state.cached = None
        self.history.release(here)

    def evict(self, blocks: int) -> int:
        freed = self._evict_by_chance(blocks) if self.marking else 0
        heap, buckets, trim = self._heap, self._buckets, self.cache.trim
        while freed < blocks and buckets:
            _, epoch, kind = heap[0]
            bucket = buckets.get((kind, epoch))
            if bucket is None:
                heappop(heap)
                continue
            node = next(iter(bucket))
            taken = min(node.size, blocks - freed)
            trim(node, taken)
            freed += taken
        return freed

    # Learning.

    def _use(self, here: Node) -> None:
        self._clock += here.size
        self.history.use(here)
        self._end = here

    def _classify(self) -> None:
        """Give the blocks of the request that ended at `_end` their classes."""
        end, self._end = self._end, None
        if end is None or end.state is None:
            return
        line, at = [end], end
        while (above := at.parent) is not None and above.parent is not None:
            if above.state.hits - at.state.hits > 1:
                break
            at = above
            line.append(at)
        kind = self._line(at.state.hits + 1, at, end)
        for node in line:
            self.history.classify(node, kind)
            self._refile(node)
        above = at.parent
        while above is not None and above.parent is not None:
            self.history.classify(above, self._template(above))
            self._refile(above)
            above = above.parent

    def _line(self, requests: int, top: Node, end: Node) -> int:
        above = top.parent
        assert above is not None
        count = _COUNTS[requests] if requests < len(_COUNTS) else 10
        return (count * 2 + (above.parent is None)) * 7 + self._size(end.size)

    def _template(self, node: Node) -> int:
        known: Record = node.state
        return _TEMPLATES + (_HITS[known.hits] if known.hits < len(_HITS) else 8)

    def _size(self, blocks: int) -> int:
        """Length beside that of the mean new piece."""
        return bisect_right(_SIZES, blocks * self._pieces / max(self._piece_blocks, 1))

    # Leaves by rank.

    def _file(self, node: Node) -> None:
        record = node.state.state
        key = record.key = record.kind, record.epoch
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = {}
            heappush(self._heap, (self.table.rank(*key), record.epoch, record.kind))
        bucket[node] = None

    def _unfile(self, node: Node) -> None:
        record = node.state.state
        bucket = self._buckets[record.key]
        del bucket[node]
        if not bucket:
            del self._buckets[record.key]
        record.key = None

    def _refile(self, here: Node) -> None:
        """The class or epoch of a leaf changed while it was a candidate."""
        record = here.state
        if record.key is not None and record.key != (record.kind, record.epoch):
            self._unfile(record.cached)
            self._file(record.cached)

    def _order(self) -> None:
        rank = self.table.rank
        self._heap = [(rank(kind, epoch), epoch, kind) for kind, epoch in self._buckets]
        heapify(self._heap)
        self._changes = 0

    # Phases and marking.

    def _ask(self, here: Node, missed: int) -> None:
        """Count a request of a node's blocks, of which `missed` were not cached."""
        self._asked += here.size
        recent = here.state.phase
        if self.history.ask(here):
            self.budget += self.harmonic * here.size
        elif not self.marking:
            self.budget -= missed
        if self.marking and recent != self.history.phase and here.state.key is not None:
            self._pools.leave(here.state.cached)
            self._pools.join(here.state.cached, self.history.phase)

    def _begin_phase(self, above: Node) -> None:
        self.history.begin_phase(above)
        self._longest = max(self._longest, self._asked)
        self.budget = min(self.budget, SLACK * self._longest)
        self._pools.clear()
        self.marking = False
        if self.budget < 0:
            self._begin_marking()

    def _begin_marking(self) -> None:
        self.marking = True
        for bucket in self._buckets.values():
            for node in bucket:
                self._pools.join(node, self.history.phase)

    def _evict_by_chance(self, blocks: int) -> int:
        freed, draw, trim = 0, self._pools.draw, self.cache.trim
        while freed < blocks and (leaf := draw(self.rng)) is not None:
            trim(leaf, 1)
            freed += 1
        return freed

    # One record for each cached node.

    def _cut(self, node: Node, blocks: int) -> Node:
        """Part the record of a cached node from the ghost behind it; the record's node in the history."""
        below = node.state
        record = below.state
        here = self.history.split(below, blocks)
        here.state.key, record.key = record.key, None
        here.state.pool, record.pool = record.pool, None
        record.cached = None
        self._link(node, here)
        return here

    def _link(self, node: Node, here: Node) -> None:
        node.state, here.state.cached = here, node
