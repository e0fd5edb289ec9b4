"""One publisher's batches in order: what is applied, what is missing, what is forgotten.

No sockets here. Batches are numbered from 0 by the engine. A number that was skipped is a gap: what is
missing is asked for again, and if it cannot be had, all that was known of this publisher is forgotten. A
number that goes backwards is a restarted engine, whose cache is empty.

A feed is exact once it has seen everything since the cache was empty, and partial otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvist.gateway.knowledge.wire import AllCleared, BadEvents, BlocksRemoved, BlocksStored, decode
from kvist.prefix.events import EventIndex

Batch = tuple[int, bytes]  # sequence number, payload


class State(StrEnum):
    SILENT = "silent"  # nothing has been heard, or the connection is lost
    PARTIAL = "partial"  # what is held is known in part: earlier events are missing
    EXACT = "exact"


@dataclass(slots=True)
class Counts:
    """What a feed has seen, for /metrics."""

    batches: int = 0
    events: int = 0
    gaps: int = 0
    replays: int = 0
    resets: int = 0
    restarts: int = 0
    invalid: int = 0
    unknown_parents: int = 0
    lag: float = 0.0  # seconds from an event's timestamp to its arrival, by the two hosts' clocks


class Feed:
    """`restarted` is called when the engine proves to be a new one: its cache is empty."""

    def __init__(
        self,
        index: EventIndex,
        slot: int,
        rank: int = 0,
        *,
        clock: Callable[[], float],
        restarted: Callable[[], None] = lambda: None,
    ) -> None:
        self.index = index
        self.slot = slot
        self.rank = rank
        self.clock = clock  # seconds since 1970
        self.restarted = restarted
        self.state = State.SILENT
        self.counts = Counts()
        self._next: int | None = None  # the number that comes next
        self._complete = False  # everything since the cache was empty has been applied
        self._replayed_from: int | None = None  # from here to _next: replayed, may come again
        self._lost = False  # the connection broke since the last batch

    def offer(self, number: int, payload: bytes) -> int | None:
        """Apply a batch that came by itself; or the number from which a replay is needed before it."""
        expected = self._next
        if expected is None:
            if number:
                return 0
            self._next, self._complete = 0, True
        elif self._lost and number:  # who knows whether it is the same engine
            self.counts.gaps += number != expected
            self._begin()
            return 0
        elif number < expected:
            if self._replayed_from is not None and number >= self._replayed_from:
                self._replayed_from = number + 1
                return None
            self.counts.restarts += 1
            self._begin()
            self.restarted()
            if number:
                return 0
            self._next, self._complete = 0, True
        elif number > expected:
            self.counts.gaps += 1
            return expected
        self._lost = False
        self._replayed_from = None
        self._apply(number, payload)
        return None

    def replayed(self, start: int, batches: Sequence[Batch], number: int, payload: bytes) -> Iterator[None]:
        """The answer, maybe empty, to the replay that `offer` asked for on (number, payload).

        Applies one batch a step, as there may be very many; until the last one the feed is partial at best.
        """
        if batches:
            self.counts.replays += 1
        whole = bool(batches) and batches[0][0] == start
        complete = whole and (start == 0 or self._complete)
        if not whole:
            self.counts.resets += self._next is not None
        if not whole or start == 0:
            self._forget()
        self._complete = self._lost = False
        self._next = batches[0][0] if batches else number
        invalid = self.counts.invalid
        for replayed, content in [*batches, (number, payload)]:
            if replayed < self._next:
                continue
            if replayed > self._next:  # a hole in the replay itself
                self.counts.resets += 1
                self._forget()
                self._complete = complete = False
            self._apply(replayed, content)
            yield
        self._replayed_from = number + 1
        self._complete = self._complete or (complete and self.counts.invalid == invalid)
        self._show()

    def lost(self) -> None:
        """The connection broke: until the next batch nothing is believed."""
        self._lost = True
        self.state = State.SILENT

    def _begin(self) -> None:
        self._forget()
        self._next = None
        self._complete = False

    def _apply(self, number: int, payload: bytes) -> None:
        self._next = number + 1
        counts = self.counts
        counts.batches += 1
        try:
            moment, events = decode(payload)
        except BadEvents:
            counts.invalid += 1
            counts.resets += 1
            self._forget()
            self._complete = False
            self._show()
            return
        counts.lag = self.clock() - moment
        counts.events += len(events)
        index, slot = self.index, self.slot
        before = index.unknown_parents
        for event in events:
            if isinstance(event, BlocksStored):
                names = [self._name(event.group, name) for name in event.hashes]
                parent = None if event.parent is None else self._name(event.group, event.parent)
                index.stored(slot, names, parent, event.tokens, event.block_size, event.salt)
            elif isinstance(event, BlocksRemoved):
                index.removed(slot, [self._name(event.group, name) for name in event.hashes])
            elif isinstance(event, AllCleared):
                self._forget()
                self._complete = True
        counts.unknown_parents += index.unknown_parents - before
        self._show()

    def _show(self) -> None:
        if not self._lost:  # it may break amid a replay
            self.state = State.EXACT if self._complete else State.PARTIAL

    def _name(self, group: int, name: Hashable) -> Hashable:
        """A worker's data-parallel ranks and cache groups share a slot, and may share hashes."""
        return (self.rank, group, name) if self.rank or group else name

    def _forget(self) -> None:
        """Drop what this rank holds; other ranks of the worker keep theirs."""
        names = self.index.names(self.slot)
        own = [name for name in names if (name[0] if isinstance(name, tuple) else 0) == self.rank]
        if len(own) == len(names):
            self.index.cleared(self.slot)
        else:
            self.index.removed(self.slot, own)
