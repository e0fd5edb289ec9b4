"""How soon is a block asked for again? Learned online, by class and age, as rates.

A class is what the cache can see of a block when it is used (see cache/hedge.py). Time is counted in blocks
served and cut into epochs; an age is a number of epochs, in buckets that widen with age. For every class and
age the table keeps *events* (blocks used again at that age) and *exposure* (blocks times epochs lived through
at it, used again or not), so nothing is censored; events / exposure is the hazard. Old counts fade. What is
sparse leans on what is not: an age on the age before it, a class on the product of its features' effects, a
cell on its class.

What a block is worth is its hit density (LHD, Beckmann et al., NSDI 2018): P(used in the next T) / expected
epochs held until then or T, over the best of a few horizons T, since what comes back late but surely must be
held through an age at which nothing of its kind comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

RING = 256  # epochs of age told apart
FADE = 1 / 1024  # of all counts, per epoch
PRIOR = 4.0  # typical events that a prior counts for

Floats = np.ndarray[Any, np.dtype[np.float64]]


class HazardTable:
    """Rates of reuse for classes arranged in grids, one grid for each kind of block.

    grids: the number of levels of each feature, for each kind; class numbers run through them in C order.
    horizons: in epochs.
    """

    def __init__(self, grids: Sequence[tuple[int, ...]], horizons: Sequence[int]) -> None:
        self.grids = grids
        self.classes = sum(prod(grid) for grid in grids)
        edges = [0, 1, 2, 3, 4]
        while (edge := edges[-1] + edges[-1] // 3) < RING:
            edges.append(edge)
        self._edges = np.array(edges)
        self._width = np.diff([*edges, RING]).astype(float)
        self.bucket = [int(b) for b in np.searchsorted(self._edges, np.arange(RING), side="right") - 1]
        own = np.arange(len(edges))
        self._ends = [  # for each horizon and age, the bucket after the last that counts
            np.maximum(np.searchsorted(self._edges, self._edges + horizon), own + 1) for horizon in horizons
        ]
        self.epoch = 0
        self._alive = np.zeros((self.classes, RING))  # blocks by class and epoch of last use
        self.events = np.zeros((self.classes, len(edges)))
        self.exposure = np.zeros((self.classes, len(edges)))
        self._blocks = np.zeros(self.classes)  # blocks by class
        self._sizes = self._uses = 0.0
        self._faded = 0  # epoch up to which counts have faded
        self.ranks: list[list[float]] = [[0.0] * len(edges) for _ in range(self.classes)]

    def add(self, kind: int, epoch: int, blocks: int) -> None:
        """`blocks` of a class were last used in `epoch` (negative: no longer)."""
        oldest = self.epoch - RING + 1
        self._alive[kind, (epoch if epoch > oldest else oldest) % RING] += blocks
        self._blocks[kind] += blocks

    def used(self, kind: int, epoch: int, blocks: int) -> None:
        """Blocks of a class, last used in `epoch`, were used again."""
        self.events[kind, self.bucket[min(self.epoch - epoch, RING - 1)]] += blocks
        self._sizes += blocks
        self._uses += 1

    def tick(self, span: float) -> None:
        """An epoch ends that was `span` times as long as usual."""
        ages = (self.epoch - np.arange(RING)) % RING
        rows = np.flatnonzero(self._blocks)
        self.exposure[rows] += span * np.add.reduceat(self._alive[rows[:, None], ages], self._edges, axis=1)
        self.epoch += 1
        new, oldest = self.epoch % RING, (self.epoch + 1) % RING
        self._alive[:, oldest] += self._alive[:, new]
        self._alive[:, new] = 0

    def rank(self, kind: int, epoch: int) -> float:
        """Worth of a block of a class last used in `epoch`, as of the last `learn`."""
        return self.ranks[kind][self.bucket[min(self.epoch - epoch, RING - 1)]]

    def learn(self) -> None:
        """Work out all ranks from the counts. O(classes)."""
        if not self._uses:
            return
        kept = (1 - FADE) ** (self.epoch - self._faded)
        self._faded = self.epoch
        self.events *= kept
        self.exposure *= kept
        self.ranks = self._densities(self.hazards()).tolist()

    def hazards(self) -> Floats:
        """Events per block and epoch, shape (classes, age buckets), all above 0."""
        weight = PRIOR * self._sizes / self._uses
        events, exposure = self.events.sum(0), self.exposure.sum(0)
        before = (events.sum() + weight) / (exposure.sum() + 64 * weight)
        by_age = np.empty(len(events))
        for age in range(len(events)):
            before = by_age[age] = (events[age] + weight) / (exposure[age] + weight / before)
        seen, expected = self.events.sum(1), self.exposure @ by_age
        level = self._levels(seen, expected, weight)
        level *= (seen + weight) / (expected * level + weight)
        prior: Floats = level[:, None] * by_age
        return (self.events + weight) / (self.exposure + weight / prior)

    def _levels(self, seen: Floats, expected: Floats, weight: float) -> Floats:
        """Each class's events over those expected by age alone, as a product of its features' effects."""
        levels, start = np.ones(self.classes), 0
        for grid in self.grids:
            end = start + prod(grid)
            e, x = seen[start:end].reshape(grid), expected[start:end].reshape(grid)
            level = np.full(grid, (e.sum() + weight) / (x.sum() + weight))
            effects = [np.ones(levels_) for levels_ in grid]
            for _ in range(3):  # iterative proportional fitting
                for axis, old in enumerate(effects):
                    others = tuple(i for i in range(len(grid)) if i != axis)
                    new = (e.sum(others) + weight) / ((x * level).sum(others) / old + weight)
                    shape = [-1 if i == axis else 1 for i in range(len(grid))]
                    level *= (new / old).reshape(shape)
                    effects[axis] = new
            levels[start:end] = level.ravel()
            start = end
        return levels

    def _densities(self, hazard: Floats) -> Floats:
        """P(used within a horizon) / E[epochs held until then or its end], from each age bucket on."""
        zero = np.zeros((len(hazard), 1))
        stays = np.exp(-hazard * self._width)
        alive = np.concatenate([zero + 1, np.cumprod(stays, axis=1)], axis=1)
        used = 1 - alive
        held = np.concatenate([zero, np.cumsum(alive[:, :-1] * (1 - stays) / hazard, axis=1)], axis=1)
        best = np.zeros_like(hazard)
        for ends in self._ends:
            gain, cost = used[:, ends] - used[:, :-1], held[:, ends] - held[:, :-1]
            best = np.maximum(best, np.where(cost > 1e-9, gain / np.maximum(cost, 1e-9), hazard))
        return best
