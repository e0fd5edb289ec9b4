"""Uniform draws of leaf blocks: which leaf loses its last block next, many draws at once.

Drawing one block at a time means: pick a leaf uniformly among the current set, remove its last block; when a
leaf is used up, its parent may enter the set. `LeafSampler.draw` draws a whole batch of slot numbers instead
and replays it. That is the same distribution, exactly:

- The draws are independent and uniform over the m slots. A slot is first the leaf in it; when that leaf is
  used up, the parent, if it enters the set, takes over its slot, so there are still m equally likely choices.
- If no parent enters, the slot is dead. A draw that hits a dead slot is dropped; conditioned on not being
  dropped, a draw is uniform over the live slots (rejection sampling). Dropped draws are made up afterwards.
- Leaves are used up in the order in which the draws use them up (a heap of positions), so a parent enters at
  the very draw at which it would have.

A leaf in the set has its size in a numpy array, not in the node, so that a batch costs a few vector
operations whatever the number of leaves; `settle` writes a size back when the tree comes across the node.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from random import Random
from typing import Any

import numpy as np

from kvist.cache.base import EvictionPolicy
from kvist.cache.cache import PrefixCache
from kvist.prefix.tree import Node, RadixTree

_SCALAR_DRAWS = 24  # up to here, drawing one by one costs less than the vector operations

_LARGE_KEY = 4096  # bytes of an edge from which evicted tokens' memory is freed before the edge goes

Positions = np.ndarray[Any, np.dtype[np.int64]]


class LeafSampler:
    """A set of leaves of `tree` with O(1) add, discard and draw."""

    def __init__(self, rng: Random, tree: RadixTree) -> None:
        self._rng = rng
        self._bulk = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
        self._tree = tree
        self._nodes: list[Node | None] = []
        self._left = np.zeros(64, np.int64)  # blocks left, per slot
        self._low = np.zeros(64, np.int64)  # at or below this many, the node itself needs a look
        self._flag = np.zeros(64, np.bool_)
        self._heir: int | None = None  # slot that the next added node takes over
        self._drawing = False

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, node: Node) -> None:
        slot = self._heir
        if slot is not None:
            self._heir = None
            self._nodes[slot] = node
        else:
            slot = len(self._nodes)
            self._nodes.append(node)
            if slot == len(self._left):
                self._left = np.concatenate([self._left, np.zeros_like(self._left)])
                self._low = np.concatenate([self._low, np.zeros_like(self._low)])
                self._flag = np.zeros(len(self._left), np.bool_)
        node.slot = slot
        self.resize(node)

    def resize(self, node: Node) -> None:
        """Take the node's size over, after the tree changed it."""
        self._left[node.slot] = node.size
        self._low[node.slot] = node.size // 2 if len(node.key) > _LARGE_KEY else 0

    def settle(self, node: Node) -> None:
        """Write the size of a leaf in the set back to the node."""
        node.size = int(self._left[node.slot])

    def discard(self, node: Node) -> None:
        slot = node.slot
        if self._drawing:  # used up: `draw` closes the slot
            self._nodes[slot] = None
        else:
            self.settle(node)
            self._close(slot)
        node.slot = -1

    def clear(self) -> None:
        self._nodes.clear()

    def draw(self, blocks: int, touched: dict[Node, None] | None = None) -> int:
        """Remove `blocks` uniformly drawn leaf blocks, fewer if the set empties; the number removed.

        `touched` collects the leaves that lost blocks and are still there, where the caller needs to know.
        Used-up leaves are unlinked from the tree; its total is the caller's to keep.
        """
        removed = 0
        while removed < blocks and self._nodes:
            lacking = blocks - removed
            draw = self._draw_few if lacking <= _SCALAR_DRAWS else self._draw_many
            removed += draw(lacking, touched)
        return removed

    def _draw_few(self, blocks: int, touched: dict[Node, None] | None) -> int:
        random, left = self._rng.random, self._left
        removed = 0
        while removed < blocks and self._nodes:
            slot = int(random() * len(self._nodes))
            node = self._nodes[slot]
            assert node is not None
            removed += 1
            left[slot] -= 1
            if left[slot] == 0:
                self._use_up(slot, node)
                if self._nodes[slot] is None:
                    self._close(slot)
            elif touched is not None:
                touched[node] = None
        return removed

    def _draw_many(self, blocks: int, touched: dict[Node, None] | None) -> int:
        slots = self._bulk.integers(0, len(self._nodes), size=blocks)
        np.subtract.at(self._left, slots, 1)
        if touched is not None:
            for slot in np.unique(slots).tolist():
                touched[self._at(slot)] = None
        low = slots[self._left[slots] <= self._low[slots]]
        return blocks - self._replay(slots, np.unique(low), touched) if low.size else blocks

    def _replay(self, slots: Positions, low: Positions, touched: dict[Node, None] | None) -> int:
        """Put right the slots that ran low in a batch of draws; the number of draws to drop."""
        left = self._left[low]
        for slot, size in zip(low[left > 0].tolist(), left[left > 0].tolist(), strict=True):
            node = self._at(slot)
            node.size = size
            self._tree.shrink_key(node)
            self._low[slot] = size // 2
        draws = self._positions(slots, low[left <= 0])
        queue: list[tuple[int, int]] = []  # (position of the draw that uses the slot up, slot)
        for slot, hits in draws.items():
            size = int(self._left[slot]) + len(hits)
            queue.append((hits[size - 1], slot))
            draws[slot] = hits[size:]
        heapify(queue)
        dropped, dead = 0, []
        while queue:
            _, slot = heappop(queue)
            self._use_up(slot, self._at(slot))
            heir, later = self._nodes[slot], draws[slot]
            if heir is None:
                dropped += len(later)
                dead.append(slot)
            elif len(later) >= heir.size:
                heappush(queue, (int(later[heir.size - 1]), slot))
                draws[slot] = later[heir.size :]
            elif len(later):
                self._left[slot] -= len(later)
                if touched is not None:
                    touched[heir] = None
        for slot in sorted(dead, reverse=True):
            self._close(slot)
        return dropped

    def _positions(self, slots: Positions, wanted: Positions) -> dict[int, list[int]]:
        """Where in `slots` each of the `wanted` slots was drawn, in order."""
        self._flag[wanted] = True
        at = np.flatnonzero(self._flag[slots])
        self._flag[wanted] = False
        positions: dict[int, list[int]] = {slot: [] for slot in wanted.tolist()}
        for position, slot in zip(at.tolist(), slots[at].tolist(), strict=True):
            positions[slot].append(position)
        return positions

    def _at(self, slot: int) -> Node:
        node = self._nodes[slot]
        assert node is not None
        return node

    def _use_up(self, slot: int, node: Node) -> None:
        """Unlink a leaf without blocks; its parent, if it joins the set meanwhile, takes over the slot."""
        node.size = 0
        self._heir, self._drawing = slot, True
        self._tree.unlink(node)
        self._heir, self._drawing = None, False

    def _close(self, slot: int) -> None:
        """Remove a slot by moving the last one into it."""
        last = self._nodes.pop()
        if slot < len(self._nodes):
            assert last is not None
            self._nodes[slot] = last
            last.slot = slot
            self._left[slot] = self._left[len(self._nodes)]
            self._low[slot] = self._low[len(self._nodes)]


class SampledPolicy(EvictionPolicy):
    """Base of policies that draw victims from a `LeafSampler`."""

    def attach(self, cache: PrefixCache) -> None:
        super().attach(cache)
        self.sampler = LeafSampler(self.rng, cache.tree)

    def split(self, upper: Node, lower: Node) -> None:
        if lower.slot >= 0:
            self.sampler.resize(lower)

    def settle(self, node: Node) -> None:
        self.sampler.settle(node)

    def remove(self, node: Node) -> None:
        if self.cache.on_event is not None:
            self.cache.removed(node, 0)

    def reset(self) -> None:
        self.sampler.clear()

    def draw(self, blocks: int) -> int:
        """Evict `blocks` uniformly drawn leaf blocks of the sampler's set; the number evicted."""
        touched: dict[Node, None] | None = None if self.cache.on_event is None else {}
        removed = self.sampler.draw(blocks, touched)
        self.cache.tree.total -= removed
        for node in touched or ():
            if node.slot >= 0:
                self.sampler.settle(node)
                self.cache.removed(node, node.size)
        return removed
