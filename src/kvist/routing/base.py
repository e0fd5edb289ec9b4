"""What a routing policy is: a pure rule over candidates, told of every outcome.

A policy sees time and randomness only as arguments. The host (simulator, gateway, Ray Serve, Envoy picker)
talks to `kvist.routing.router.Router`, which owns the prefix index and the bookkeeping every policy shares
(requests in flight, pending prefill tokens) and calls the policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import ClassVar

from kvist.model import Query, WorkerState


@dataclass(slots=True)
class Candidate:
    """One worker as a choice for one query: `cached` is h_ij in tokens, as the router's index has it."""

    worker: WorkerState
    cached: int


@dataclass(slots=True)
class Decision:
    """Where a query goes and why.

    `scores` hold, per candidate and in the candidates' order, what the policy compared (smaller is better);
    for LBGR these are predicted latencies in seconds. `reason` is one short phrase for logs and dashboard.
    """

    worker: str
    cached: int
    predicted: float | None = None  # latency in seconds of the chosen worker; None: nothing is predicted
    scores: Sequence[float] = ()
    reason: str = ""
    predicted_ttft: float | None = None  # its time to first token, likewise
    memo: tuple[float, ...] = ()  # the policy's own, from `choose` to `dispatched`


class Status(StrEnum):
    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Outcome:
    """How a routed request ended. Times in seconds; None where unknown (no stream, no count)."""

    status: Status = Status.OK
    latency: float | None = None  # routed -> last token
    ttft: float | None = None  # routed -> first token
    cached_tokens: int | None = None  # the engine's own count
    output_tokens: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in flight, as the router keeps it from `route` to `complete`."""

    query: Query
    worker: WorkerState
    decision: Decision
    routed_at: float
    policy: RoutingPolicy  # the one that decided, which may not be the current one
    candidates: Sequence[Candidate] = ()  # in the order of the decision's scores; their `cached` moves on
    first_token_at: float | None = None
    done: bool = False
    memo: tuple[float, ...] = ()  # the policy's own: features, reservation, …


class RoutingPolicy(ABC):
    """Base of all routing policies. Subclasses set the class variables; `params` documents the keywords.

    Life of a request: choose -> dispatched -> (first_token) -> completed. `completed` is called exactly once
    for each dispatched ticket, whatever its end.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    params: ClassVar[dict[str, str]] = {}
    shortlist: int = 0  # more workers than this: only so many are scored (kvist.routing.shortlist); 0: all
    needs_index: ClassVar[bool] = True  # False: the router skips the prefix match; `cached` is then 0

    def __init__(self, *, rng: Random | None = None) -> None:
        self.rng = rng if rng is not None else Random(0)

    @abstractmethod
    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        """Pick one of the non-empty `candidates`; must not change state that `dispatched` changes."""

    def worker_added(self, worker: WorkerState, now: float) -> None:
        """A worker joined (or came back under the same id)."""

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        """A worker left; tickets still in flight on it will be completed as FAILED."""

    def dispatched(self, ticket: Ticket, now: float) -> None:
        """The query was sent to the chosen worker: make reservations here."""

    def first_token(self, ticket: Ticket, now: float) -> None:
        """The first token of the answer came back: prefill is over."""

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """The request ended: give reservations back, learn."""

    def health(self) -> dict[str, dict[str, float]]:
        """How far predictions hold, per worker id; {} where nothing is predicted.

        error: usual relative error; drift: actual over predicted of late (1: none); pace: seconds a prompt
        token to compute; tpot: seconds a further output token; answers: seen so far.
        """
        return {}

    def snapshot(self) -> dict[str, object]:
        """Learned state as plain JSON-able data, for a restart; {} where nothing is learned."""
        return {}

    def restore(self, state: dict[str, object]) -> None:
        """Take back what `snapshot` gave. Raises ValueError naming the field if it does not fit."""
