"""How policies pick among equals."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.routing.base import Candidate, Decision


def smallest(
    scores: Sequence[float], candidates: Sequence[Candidate], rng: Random, *, reason: str, within: float = 0.0
) -> Decision:
    """The candidate with the smallest score; among those no more than `within` above it, a random one."""
    best = min(scores)
    ties = [i for i, score in enumerate(scores) if score <= best + within]
    chosen = ties[0] if len(ties) == 1 else ties[int(rng.random() * len(ties))]
    candidate = candidates[chosen]
    return Decision(candidate.worker.id, candidate.cached, None, scores, reason)
