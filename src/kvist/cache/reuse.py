"""When blocks are asked for again: counts by class and age, not censored by what the cache evicts.

Time is counted in blocks served and cut into epochs; an age is a number of epochs since a block's last use,
in buckets that widen with age. *Events* are blocks used again at an age; *exposure* is blocks times epochs
lived through at it, used again or not. A block counts less the longer its use is ago.

Uses are noted when they happen, in O(1), and counted when somebody wants to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RING = 1024  # epochs of age told apart
FADE = 1 / 1024  # of a block's weight, per epoch since its use

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def _age_buckets() -> list[int]:
    edges = [0, 1, 2, 3, 4]
    while (edge := edges[-1] + edges[-1] // 3) < RING:
        edges.append(edge)
    return edges


EDGES = np.array(_age_buckets())  # the first age of each bucket
WIDTH = np.diff([*EDGES, RING]).astype(float)
_BUCKETS = np.searchsorted(EDGES, np.arange(RING), side="right") - 1
BUCKET: list[int] = _BUCKETS.tolist()  # of each age
_WEIGHT = (1 - FADE) ** np.arange(RING)  # of a block, by age
_WITHIN = np.arange(RING) - EDGES[_BUCKETS] + 0.5  # epochs lived in the bucket of an age


class ReuseCounts:
    """kinds: the number of classes of each kind of block; class numbers run through them."""

    def __init__(self, kinds: Sequence[int]) -> None:
        self.starts = np.cumsum([0, *kinds])  # first class of each kind, and the number of all
        self.epoch = 0
        self.seen: Ints = np.zeros(0, dtype=int)  # classes that had blocks, ascending
        self._moves: list[tuple[int, int, int]] = []  # (class, epoch of last use, blocks)
        self._used: list[tuple[int, int, int, int]] = []  # (class, epoch of last use, epoch, blocks)
        self._lost: list[tuple[int, int, int, int]] = []
        self._requests: list[int] = []  # length of `_used` when each ended
        self._counted = 0  # epoch of the last `collect`
        classes, shape = self.starts[-1], (self.starts[-1], len(EDGES))
        self._alive = np.zeros((classes, RING))  # blocks by class and epoch of last use, a ring
        self._events = np.zeros(shape)
        self._ended = np.zeros(shape)  # blocks used again or lost at an age
        self._partly = np.zeros(shape)  # epochs that these lived through in that age's bucket
        self._sizes, self._squares = np.zeros(len(kinds)), np.zeros(len(kinds))

    def add(self, kind: int, epoch: int, blocks: int) -> None:
        """`blocks` of class `kind` were last used in `epoch` (negative: no longer)."""
        self._moves.append((kind, epoch, blocks))

    def used(self, kind: int, epoch: int, blocks: int) -> None:
        """Blocks of a class, last used in `epoch`, were used again; `add` says where they go."""
        self._used.append((kind, epoch, self.epoch, blocks))

    def lost(self, kind: int, epoch: int, blocks: int) -> None:
        """Blocks of a class, last used in `epoch`, are no longer watched."""
        self._lost.append((kind, epoch, self.epoch, blocks))
        self._moves.append((kind, epoch, -blocks))

    def served(self) -> None:
        """A request ends. What it used again, it used together."""
        self._requests.append(len(self._used))

    def any_used(self) -> bool:
        return bool(self._used) or bool(self._sizes.any())

    def alive(self) -> Floats:
        """Blocks watched, by class."""
        self._count()
        total: Floats = self._alive.sum(1)
        return total

    def chance(self, kind: int) -> float:
        """Blocks of a kind that are used again together, weighted by themselves: the size of one event."""
        return float(self._squares[kind] / self._sizes[kind]) if self._sizes[kind] else 1.0

    def collect(self) -> tuple[Floats, Floats]:
        """(events, exposure) of the classes in `seen`, shape (classes, age buckets)."""
        self._count()
        rows = self.seen
        ages = (self.epoch - np.arange(RING)) % RING
        alive = self._alive[rows[:, None], ages] * _WEIGHT
        ended = self._ended[rows] + np.add.reduceat(alive, EDGES, axis=1)
        exposure = self._partly[rows] + np.add.reduceat(alive * _WITHIN, EDGES, axis=1)
        later = np.cumsum(ended[:, :0:-1], axis=1)[:, ::-1]  # ended, or alive, beyond this bucket
        exposure[:, :-1] += later * WIDTH[:-1]
        return self._events[rows], exposure

    def _count(self) -> None:
        """Bring the counts up to this epoch."""
        now, before = self.epoch, self._counted
        self._counted = now
        kept = (1 - FADE) ** (now - before)
        for counts in (self._events, self._ended, self._partly, self._sizes, self._squares):
            counts *= kept
        for ends in (self._used, self._lost):
            if not ends:
                continue
            kinds, epochs, ended, blocks = np.array(ends).T
            ages = np.minimum(ended - epochs, RING - 1)
            at, weight = (kinds, _BUCKETS[ages]), blocks * (1 - FADE) ** (ages + now - ended)
            np.add.at(self._ended, at, weight)
            np.add.at(self._partly, at, weight * _WITHIN[ages])
            if ends is self._used:
                np.add.at(self._events, at, weight)
                self._group(kinds, blocks)
            ends.clear()
        self._requests.clear()
        oldest = now - RING + 1
        if passed := min(now - before, RING - 1):
            gone = np.arange(oldest - passed, oldest) % RING
            self._alive[:, oldest % RING] += self._alive[:, gone].sum(1)
            self._alive[:, gone] = 0
        if self._moves:
            kinds, epochs, blocks = np.array(self._moves).T
            np.add.at(self._alive, (kinds, np.maximum(epochs, oldest) % RING), blocks)
            self._moves.clear()
            self.seen = np.union1d(self.seen, kinds)

    def _group(self, kinds: Ints, blocks: Ints) -> None:
        """Add up what each request used again of each kind."""
        request = np.searchsorted(self._requests, np.arange(len(blocks)), side="right")
        for number, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            together = np.bincount(request, weights=blocks * ((kinds >= start) & (kinds < end)))
            self._sizes[number] += together.sum()
            self._squares[number] += (together**2).sum()
