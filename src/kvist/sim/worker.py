"""A worker of the simulated cluster: an engine, and where it stands in time."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.events import CacheEvent
from kvist.engine.core import Engine
from kvist.engine.latency import COEFFICIENTS, load_profile
from kvist.engine.order import make_order
from kvist.model import Query
from kvist.routing.base import Ticket
from kvist.sim.base import SimConfig, WorkerSpec


class Flight:
    """A query between its arrival and its end, over all attempts. counted: it is past the warm-up."""

    __slots__ = ("counted", "query", "ticket")

    def __init__(self, query: Query, counted: bool) -> None:
        self.query = query
        self.counted = counted
        self.ticket: Ticket | None = None


class Worker:
    """stepping: a step or a wake-up is on the cluster's agenda."""

    __slots__ = (
        "_profile",
        "alive",
        "busy_before",
        "cached_tokens",
        "engine",
        "on_event",
        "prompt_tokens",
        "requests",
        "spec",
        "stepping",
    )

    def __init__(
        self, spec: WorkerSpec, config: SimConfig, on_event: Callable[[CacheEvent], None] | None = None
    ) -> None:
        self.spec = spec
        self._profile = profile = load_profile(spec.profile or config.profile)
        self.on_event = on_event
        name = spec.eviction or config.eviction
        params = config.eviction_params if name == config.eviction else {}
        eviction = make_eviction(name, rng=Random(f"{config.seed}/{spec.id}"), **params)
        tokens = spec.kv_tokens or config.kv_tokens or profile.capacity
        cache = PrefixCache(
            tokens, eviction, block_size=config.block_size, unit=config.unit, on_event=on_event
        )
        self.engine = Engine(
            cache,
            profile,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            queue=make_order(config.order, **config.order_params),
        )
        self.alive = True
        self.stepping = False
        self.busy_before = 0.0  # computing time before the warm-up was over
        self.requests = self.prompt_tokens = self.cached_tokens = 0

    def set_pace(self, factor: float) -> None:
        """From the next step on, steps take `factor` times what the profile says."""
        scaled = {name: getattr(self._profile, name) * factor for name in COEFFICIENTS}
        self.engine.profile = msgspec.structs.replace(self._profile, **scaled)
