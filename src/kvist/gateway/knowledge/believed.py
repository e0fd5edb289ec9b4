"""What the gateway believes of all caches: the engines' word where it is complete, else its own index.

For each worker, while its KV events are
    exact (everything since its cache was empty has been seen): the events alone count, and what they are
        about to say;
    partial (joined late, or a gap that no replay filled): the longer of events and own index;
    silent (nothing heard yet, or the connection is lost): the own index alone.
The own index learns from decisions and from `usage` at all times, so that it is ready when events fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvist.gateway.knowledge.feed import Feed, State
from kvist.model import Query
from kvist.prefix.events import EventIndex
from kvist.prefix.index import PrefixIndex


class BelievedIndex:
    """See `kvist.prefix.base.PrefixKnowledge`. `feeds` fill `events`, one for each rank of a worker."""

    def __init__(self, own: PrefixIndex, events: EventIndex, feeds: Mapping[int, Sequence[Feed]]) -> None:
        self.own = own
        self.events = events
        self.feeds = feeds
        self._slots: set[int] = set()

    def add_worker(self, slot: int, capacity: int) -> None:
        self._slots.add(slot)
        self.own.add_worker(slot, capacity)
        self.events.add_worker(slot, capacity)

    def set_capacity(self, slot: int, capacity: int) -> None:
        self.own.set_capacity(slot, capacity)

    def remove_worker(self, slot: int) -> None:
        self._slots.discard(slot)
        self.own.remove_worker(slot)
        self.events.remove_worker(slot)

    def state(self, slot: int) -> State:
        """That of the worker's least trustworthy rank."""
        states = [feed.state for feed in self.feeds.get(slot, ())]
        if not states or State.SILENT in states:
            return State.SILENT
        return State.PARTIAL if State.PARTIAL in states else State.EXACT

    def restarted(self, slot: int) -> None:
        """The engine is a new one and holds nothing."""
        self.own.forget(slot)

    def match(self, query: Query, slots: int, now: float = 0.0) -> list[int]:
        said = self.events.match(query, slots, now)
        states = {slot: self.state(slot) for slot in self._slots}
        if any(state is not State.EXACT for state in states.values()):
            own = self.own.match(query, slots, now)
            for slot, state in states.items():
                if state is State.SILENT:
                    said[slot] = own[slot]
                elif state is State.PARTIAL:
                    said[slot] = max(said[slot], own[slot])
        for slot in self._slots:
            if said[slot] >= query.length:  # an engine computes the last token anew, so its block too
                said[slot] = max(said[slot] - (self.events.block_size(slot) or self.own.block_size), 0)
        return said

    def routed(self, query: Query, slot: int, now: float = 0.0) -> None:
        self.own.routed(query, slot, now)
        self.events.routed(query, slot, now)

    def answered(
        self, query: Query, slot: int, expected: int, cached: int | None, output: int = 0, now: float = 0.0
    ) -> None:
        self.own.answered(query, slot, expected, cached, output, now)
        self.events.answered(query, slot, expected, cached, output, now)

    def dropped(self, query: Query, slot: int, now: float = 0.0) -> None:
        self.own.dropped(query, slot, now)
        self.events.dropped(query, slot, now)

    def cached_tokens(self, slot: int) -> int:
        index = self.own if self.state(slot) is State.SILENT else self.events
        return index.cached_tokens(slot)
