"""Which workers are worth scoring, where there are very many.

Scores compare a saving (the prefix that a worker holds) with a load. So the best worker is among those that
hold most of the prompt, or it is one of the idlest of all others; of a random handful of these the least
loaded is nearly as idle as the idlest (the power of d choices, Mitzenmacher 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from kvist.routing.base import Candidate


def shortlist(
    candidates: Sequence[Candidate], cached: Sequence[int], size: int, rng: Random
) -> list[Candidate]:
    """At most `size` of more candidates: half for the longest prefixes, random among equals, random others.

    cached: tokens by worker slot, as the index has them.
    """
    holders = [c for c in candidates if cached[c.worker.slot]]
    half = size // 2
    if len(holders) > half:
        least = sorted((cached[c.worker.slot] for c in holders), reverse=True)[half - 1] if half else 0
        longest = [c for c in holders if cached[c.worker.slot] > least]
        equals = [c for c in holders if cached[c.worker.slot] == least]
        holders = longest + rng.sample(equals, half - len(longest)) if half else []
    taken = {c.worker.slot for c in holders}
    others = rng.sample(candidates, size)
    return holders + [c for c in others if c.worker.slot not in taken][: size - len(holders)]
