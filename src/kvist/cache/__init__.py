"""One worker's prefix cache and the eviction policies, by name."""

from __future__ import annotations

from random import Random
from typing import Any

from kvist.cache.base import EvictionPolicy
from kvist.cache.belady import Belady
from kvist.cache.cache import Inserted, Match, PrefixCache
from kvist.cache.fifos import S3FIFO, Sieve
from kvist.cache.hedge import Hedge
from kvist.cache.lhd import LHD
from kvist.cache.lpc import LPC
from kvist.cache.marconi import Marconi
from kvist.cache.recency import FIFO, LRUK, SLRU, LeafLFU, LeafLRU
from kvist.cache.rlt import RLT, RandomLeaf
from kvist.cache.tlru import TLRU

_ALL: tuple[type[EvictionPolicy], ...] = (
    LeafLRU,
    RLT,
    Hedge,
    LeafLFU,
    LRUK,
    FIFO,
    SLRU,
    Sieve,
    S3FIFO,
    LHD,
    LPC,
    Marconi,
    TLRU,
    RandomLeaf,
    Belady,
)
EVICTIONS: dict[str, type[EvictionPolicy]] = {policy.name: policy for policy in _ALL}
RECOMMENDED = Hedge.name  # what is used where nobody chooses; docs/eviction.md says why


def make_eviction(name: str, *, rng: Random | None = None, **params: Any) -> EvictionPolicy:
    """A new policy by name. Raises ValueError for an unknown name or parameter."""
    if name not in EVICTIONS:
        raise ValueError(f"unknown eviction policy {name!r}: choose one of {', '.join(EVICTIONS)}")
    try:
        return EVICTIONS[name](rng=rng, **params)
    except TypeError as error:
        raise ValueError(f"eviction policy {name}: {error}") from None


__all__ = ["EVICTIONS", "RECOMMENDED", "EvictionPolicy", "Inserted", "Match", "PrefixCache", "make_eviction"]
