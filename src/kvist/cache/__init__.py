"""One worker's prefix cache and the eviction policies, by name."""

from __future__ import annotations

from random import Random
from typing import Any

from kvist.cache.base import EvictionPolicy
from kvist.cache.belady import Belady
from kvist.cache.cache import Inserted, Match, PrefixCache
from kvist.cache.hedge import Hedge
from kvist.cache.recency import FIFO, SLRU, LeafLFU, LeafLRU
from kvist.cache.rlt import RLT, RandomLeaf

EVICTIONS: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (LeafLRU, RLT, Hedge, LeafLFU, FIFO, SLRU, RandomLeaf, Belady)
}


def make_eviction(name: str, *, rng: Random | None = None, **params: Any) -> EvictionPolicy:
    """A new policy by name. Raises ValueError for an unknown name or parameter."""
    if name not in EVICTIONS:
        raise ValueError(f"unknown eviction policy {name!r}: choose one of {', '.join(EVICTIONS)}")
    try:
        return EVICTIONS[name](rng=rng, **params)
    except TypeError as error:
        raise ValueError(f"eviction policy {name}: {error}") from None


__all__ = ["EVICTIONS", "EvictionPolicy", "Inserted", "Match", "PrefixCache", "make_eviction"]
