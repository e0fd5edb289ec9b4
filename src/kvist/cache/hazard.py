"""What is a block worth? Learned online from the counts of cache/reuse.py.

The hazard of a class at an age is events / exposure. What is sparse leans on what is not: a class on the
product of its features' effects on all ages, an age on the age before it; how strongly, is learned too. If
classes differ by no more than chance, they are one class (empirical Bayes). What one request uses again is
one event of chance, however many blocks that are.

A block's worth is its hit density (LHD, Beckmann et al., NSDI 2018): P(used in the next T) / expected epochs
held until then or T, over the best of a few horizons T, since what comes back late but surely must be held
through an age at which nothing of its kind comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from kvist.cache.reuse import BUCKET, EDGES, RING, WIDTH, Floats, ReuseCounts

SPREAD = 0.5  # variance of levels before there is data
WEIGHT = 16  # events that this counts for


class HazardTable:
    """Hazards and ranks of classes arranged in grids, one grid for each kind of block.

    grids: the number of levels of each feature, for each kind; class numbers run through them in C order.
    horizons: in epochs.
    """

    def __init__(self, grids: Sequence[tuple[int, ...]], horizons: Sequence[int]) -> None:
        self.grids = grids
        self.counts = ReuseCounts([prod(grid) for grid in grids])
        own = np.arange(len(EDGES))
        self._ends = [  # for each horizon and age, the bucket after the last that counts
            np.maximum(np.searchsorted(EDGES, EDGES + horizon), own + 1) for horizon in horizons
        ]
        self._ranks: Floats = np.zeros((self.counts.starts[-1], len(EDGES)))

    def rank(self, kind: int, epoch: int) -> float:
        """Worth of a block of class `kind` last used in `epoch`, as of the last `learn`."""
        age = self.counts.epoch - epoch
        return self._ranks.item(kind, BUCKET[age if age < RING else RING - 1])

    def learn(self) -> None:
        """Work out all ranks from the counts. O(classes)."""
        if not self.counts.any_used():
            return
        hazard, unseen = self.hazards()
        self._ranks = unseen  # of one age alone: good enough until such blocks are seen
        self._ranks[self.counts.seen] = _densities(hazard, self._ends)

    def hazards(self) -> tuple[Floats, Floats]:
        """Events per block and epoch, all above 0: of the classes seen, and a guess for all classes."""
        all_events, all_exposure = self.counts.collect()
        seen, starts = self.counts.seen, self.counts.starts
        hazard, guess = np.empty_like(all_events), np.empty_like(self._ranks)
        for number, grid in enumerate(self.grids):
            start, end = starts[number], starts[number + 1]
            part = slice(*np.searchsorted(seen, (start, end)))
            rows, events, exposure = seen[part] - start, all_events[part], all_exposure[part]
            chance = self.counts.chance(number)
            by_age = _by_age(events.sum(0), exposure.sum(0), chance)
            used, expected = np.zeros(end - start), np.zeros(end - start)
            used[rows], expected[rows] = events.sum(1), exposure @ by_age
            level = _effects(used.reshape(grid), expected.reshape(grid), chance).ravel()
            level *= _shrunk(used, expected * level, chance)
            guess[start:end] = level[:, None] * by_age
            hazard[part] = _by_class(events, exposure, guess[start:end][rows], by_age, chance)
        return hazard, guess


def _by_age(events: Floats, exposure: Floats, chance: float) -> Floats:
    """Hazards of all classes together; each age leans on the one before it."""
    before = (events.sum() + chance) / (exposure.sum() + 64 * chance)
    by_age = np.empty(len(events))
    for age in range(len(events)):
        before = by_age[age] = (events[age] + chance) / (exposure[age] + chance / before)
    return by_age


def _effects(used: Floats, expected: Floats, chance: float) -> Floats:
    """Each class's events over those expected by age alone, as a product of its features' effects."""
    level = np.ones(used.shape)
    effects = [np.ones(levels) for levels in used.shape]
    for _ in range(3):  # iterative proportional fitting
        for axis, old in enumerate(effects):
            others = tuple(i for i in range(used.ndim) if i != axis)
            new = _shrunk(used.sum(others), (expected * level).sum(others) / old, chance)
            level *= (new / old).reshape([-1 if i == axis else 1 for i in range(used.ndim)])
            effects[axis] = new
    return level


def _by_class(events: Floats, exposure: Floats, guess: Floats, by_age: Floats, chance: float) -> Floats:
    """Each age of a class leans on the one before it, and on how hazards change there by age alone."""
    hazard = np.empty_like(events)
    weight = chance / max(_spread(events, exposure * guess, chance, 0.0), 1e-9)
    change = by_age[1:] / by_age[:-1]
    before = guess[:, 0]
    for age in range(len(by_age)):
        if age:
            before = before * change[age - 1]
        before = hazard[:, age] = (events[:, age] + weight) / (exposure[:, age] + weight / before)
    return hazard


def _shrunk(used: Floats, expected: Floats, chance: float) -> Floats:
    """Used over expected, drawn to 1 as far as chance explains the differences."""
    spread = _spread(used, expected, chance, SPREAD)
    return (used * spread + chance) / (expected * spread + chance)


def _spread(used: Floats, expected: Floats, chance: float, prior: float) -> float:
    """The variance of used over expected that chance does not explain, by moments."""
    total, squares = expected.sum(), (expected**2).sum()
    noise = chance * (total - squares / total) if total else 0.0
    weight = (WEIGHT * chance) ** 2
    return float(max((((used - expected) ** 2).sum() - noise + prior * weight) / (squares + weight), 0.0))


def _densities(hazard: Floats, horizons: Sequence[np.ndarray]) -> Floats:
    """P(used within a horizon) / E[epochs held until then or its end], from each age bucket on."""
    zero = np.zeros((len(hazard), 1))
    stays = np.exp(-hazard * WIDTH)
    alive = np.concatenate([zero + 1, np.cumprod(stays, axis=1)], axis=1)
    used = 1 - alive
    held = np.concatenate([zero, np.cumsum(alive[:, :-1] * (1 - stays) / hazard, axis=1)], axis=1)
    best = np.zeros_like(hazard)
    for ends in horizons:
        gain, cost = used[:, ends] - used[:, :-1], held[:, ends] - held[:, :-1]
        best = np.maximum(best, np.where(cost > 1e-9, gain / np.maximum(cost, 1e-9), hazard))
    return best
