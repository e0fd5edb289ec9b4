"""LPC, learned prefix caching: recency, corrected by how likely a conversation goes on.

A leaf's worth is P(it is continued) * exp(-age / tau), tau the mean time to a continuation; its logarithm
orders leaves the same at all times, so it is fixed when the leaf is used. The probability comes from a
logistic regression, trained online: a leaf that is used again was continued, one evicted unused was not.
"""

from __future__ import annotations

from math import exp, log, log1p
from random import Random

from kvist.cache.heap import PriorityPolicy
from kvist.model import Query
from kvist.prefix.tree import Node

RATE = 0.05  # of the stochastic gradient steps
WEIGHT = 0.02  # of the newest time to a continuation in tau

Features = tuple[float, ...]


class LPC(PriorityPolicy):
    """node.last: last use, in requests; node.hits: uses again; node.state: (features, depth, worth)."""

    name = "lpc"
    description = "Recency plus the learned probability that a conversation goes on."
    source = (
        "Yang et al., NeurIPS 2025. Their predictor reads the conversation's text; a cache has none, so this "
        "one sees structure and time: depth, turns, length of the last piece, siblings, the last gap"
    )

    def __init__(self, *, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        self._forget()

    def _forget(self) -> None:
        self.weights = [0.0] * 7
        self.tau = 0.0
        self._now = 0

    def reset(self) -> None:
        super().reset()
        self._forget()

    def begin(self, query: Query | None, now: float) -> None:
        self._now += 1

    def hit(self, node: Node, now: float) -> None:
        gap = self._now - node.last
        if gap > 0:
            self.tau += (gap - self.tau) * (WEIGHT if self.tau else 1.0)
            self._learn(node.state[0], 1.0)
        node.hits += 1
        self._use(node, gap)

    def touch(self, node: Node, now: float) -> None:
        if node.last != self._now:
            self._use(node, self._now - node.last)

    def insert(self, node: Node, now: float) -> None:
        self._use(node, 0)

    def split(self, upper: Node, lower: Node) -> None:
        upper.last, upper.hits = lower.last, lower.hits
        features, depth, worth = lower.state
        upper.state = (features, depth, worth)
        lower.state = (features, depth + 1, worth)

    def remove(self, node: Node) -> None:
        self._learn(node.state[0], 0.0)

    def priority(self, node: Node) -> float:
        return float(node.state[2])

    def probability(self, features: Features) -> float:
        total = sum(w * x for w, x in zip(self.weights, features, strict=True))
        return 1 / (1 + exp(-max(min(total, 30.0), -30.0)))

    def _use(self, node: Node, gap: float) -> None:
        parent = node.parent
        assert parent is not None
        depth = (parent.state[1] if parent.state else 0) + 1
        features = (
            1.0,
            log1p(depth),
            log1p(node.hits),
            log1p(node.size * self.cache.block_size) / 8,
            log1p(len(parent.children)),
            log1p(gap) / 4,
            float(parent.parent is None),
        )
        node.last = self._now
        worth = log(self.probability(features)) + self._now / max(self.tau, 1.0)
        node.state = (features, depth, worth)

    def _learn(self, features: Features, continued: float) -> None:
        error = continued - self.probability(features)
        self.weights = [w + RATE * error * x for w, x in zip(self.weights, features, strict=True)]
