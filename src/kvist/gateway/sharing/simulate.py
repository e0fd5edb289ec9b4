"""Several gateways in front of the same simulated workers, each hearing only of its own requests.

    result = simulate(queries, SimConfig(...), Gateways(4, interval=0.5))

With an interval they exchange shares that often, in simulated time; with None each learns alone. Clients
spread their requests at random, as a load balancer in front of gateways does, or each session (a group of
prompts that share a prefix, a conversation) keeps to one gateway. With `SimConfig.kv_events` all gateways
know the caches exactly, else each knows what it sent where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from random import Random
from zlib import crc32

from kvist.gateway.sharing.fleet import SharedFleet
from kvist.model import Query, WorkerState
from kvist.prefix.base import PrefixKnowledge
from kvist.prefix.index import PrefixIndex
from kvist.routing import Outcome, Router, Ticket, make_policy
from kvist.sim import Cluster, SimConfig, SimResult


@dataclass(frozen=True, slots=True)
class Gateways:
    """interval: simulated seconds between exchanges, None: none. Raises ValueError."""

    count: int
    interval: float | None = None
    sticky: bool = False  # a session keeps to one gateway

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"gateways must be at least 1, not {self.count}")
        if self.interval is not None and not self.interval > 0:
            raise ValueError(f"interval must be above 0 seconds, not {self.interval}")


def simulate(queries: Iterable[Query], config: SimConfig, gateways: Gateways) -> SimResult:
    """As `kvist.sim.simulate`, with several gateways; identical for identical seeds."""
    cluster = Cluster(config)
    first = cluster.router
    routers = [first]
    for number in range(1, gateways.count):
        policy = make_policy(
            config.router, rng=Random(f"{config.seed}/router{number}"), **config.router_params
        )
        index: PrefixKnowledge = PrefixIndex(unit=config.unit, block_size=config.block_size)
        if config.kv_events:
            index = _SameEvents(first.index)
        routers.append(Router(policy, index=index))
    cluster.router = _Spread(routers, gateways, Random(f"{config.seed}/gateways"))
    return cluster.run(queries)


class _SameEvents:
    """The one index of KV events, as a further gateway sees it; workers join and leave it once."""

    def __init__(self, index: PrefixKnowledge) -> None:
        self.match = index.match
        self.routed = index.routed
        self.answered = index.answered
        self.dropped = index.dropped
        self.cached_tokens = index.cached_tokens

    def add_worker(self, slot: int, capacity: int) -> None:
        pass

    def set_capacity(self, slot: int, capacity: int) -> None:
        pass

    def remove_worker(self, slot: int) -> None:
        pass


class _Spread(Router):
    """Looks like a router to the cluster; every request is one of several routers' from start to end."""

    def __init__(self, routers: list[Router], gateways: Gateways, rng: Random) -> None:
        super().__init__(routers[0].policy, index=routers[0].index)
        self.routers = routers
        self.interval = interval = gateways.interval
        self.sticky = gateways.sticky
        self.rng = rng
        self.fleets = [SharedFleet(r, f"g{i}", 0, _fresh(interval)) for i, r in enumerate(routers)]
        self._next = 0.0
        self._owner: dict[Ticket, Router] = {}

    def route(self, query: Query, now: float, allowed: Collection[str] | None = None) -> Ticket:
        if self.interval is not None and now >= self._next:
            self._exchange(now)
            self._next = now + self.interval
        if self.sticky:
            number = crc32(query.session.encode()) % len(self.routers)
        else:
            number = int(self.rng.random() * len(self.routers))
        router = self.routers[number]
        ticket = router.route(query, now, allowed)
        self._owner[ticket] = router
        return ticket

    def _exchange(self, now: float) -> None:
        shares = [fleet.own() for fleet in self.fleets]
        for fleet in self.fleets:
            fleet.peers.receive(shares, now)
            fleet.refresh(now)

    def first_token(self, ticket: Ticket, now: float) -> None:
        self._owner[ticket].first_token(ticket, now)

    def complete(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        self._owner.pop(ticket).complete(ticket, outcome, now)

    def add_worker(self, worker_id: str, now: float = 0.0, *, capacity: int = 0) -> WorkerState:
        states = [router.add_worker(worker_id, now, capacity=capacity) for router in self.routers]
        return states[0]

    def remove_worker(self, worker_id: str, now: float = 0.0) -> None:
        for router in self.routers:
            router.remove_worker(worker_id, now)


def _fresh(interval: float | None) -> float:
    return 3 * interval if interval is not None else 1.0
