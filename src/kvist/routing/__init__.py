"""Which worker serves a query: the routing policies, by name, and the router that hosts them."""

from __future__ import annotations

from random import Random
from typing import Any

from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.cache_aware import CacheAware
from kvist.routing.lbgr import LBGR
from kvist.routing.lbgr_paper import LBGRPaper
from kvist.routing.lbgr_reference import LBGRReference
from kvist.routing.linear import KVScore, LMetric
from kvist.routing.preble import Preble
from kvist.routing.prefix_hash import PrefixHash
from kvist.routing.router import NoWorker, Router
from kvist.routing.simple import LeastLoad, PowerOfTwo, RandomChoice, RoundRobin
from kvist.routing.skylb import SkyLB

ROUTERS: dict[str, type[RoutingPolicy]] = {
    policy.name: policy
    for policy in (
        LBGR,
        LBGRPaper,
        LBGRReference,
        CacheAware,
        KVScore,
        LMetric,
        Preble,
        SkyLB,
        PrefixHash,
        LeastLoad,
        PowerOfTwo,
        RoundRobin,
        RandomChoice,
    )
}


def make_policy(name: str, *, rng: Random | None = None, **params: Any) -> RoutingPolicy:
    """A new policy by name. Raises ValueError for an unknown name or parameter."""
    if name not in ROUTERS:
        raise ValueError(f"unknown routing policy {name!r}: choose one of {', '.join(ROUTERS)}")
    try:
        return ROUTERS[name](rng=rng, **params)
    except TypeError as error:
        raise ValueError(f"routing policy {name}: {error}") from None


__all__ = [
    "ROUTERS",
    "Candidate",
    "Decision",
    "NoWorker",
    "Outcome",
    "Router",
    "RoutingPolicy",
    "Status",
    "Ticket",
    "make_policy",
]
