"""A request between the data plane's asking and the end of its answer, and what the picker asks of others."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from kvist.gateway.admission import Waiting
from kvist.gateway.prompt import Body
from kvist.model import Query
from kvist.routing import Router, Ticket

# Makes token ids of a query's text and calls back, at once or later: query, kind, body, raw body, call back.
Prepare = Callable[[Query, str, Body, bytes, Callable[[bool], None]], None]


class Endpoints(Protocol):
    """Who is there and who is well (kvist.picker.endpoints), by URL: `http://ip:port`."""

    router: Router

    def allowed(self, model: str, now: float) -> Collection[str]:
        """Endpoints that may take a request for the model now."""

    def serves(self, model: str) -> bool:
        """Whether any endpoint, well or not, may serve the model."""

    def saturated(self, model: str, now: float) -> bool:
        """Whether all endpoints for the model say themselves that they have enough."""

    def sent(self, url: str, now: float) -> None: ...
    def succeeded(self, url: str) -> None: ...
    def failed(self, url: str, now: float) -> None: ...
    def released(self, url: str) -> None: ...


class Refused(Exception):
    """The request is not placed; `status` is the HTTP status that tells the client why."""

    def __init__(self, status: int, message: str, *, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


@dataclass(slots=True)
class Asked:
    """A request as the data plane describes it. `subset`: endpoints to choose from, None for all."""

    path: str
    method: str = "POST"
    body: bytes = b""
    objective: str = ""
    fairness: str = ""
    subset: frozenset[str] | None = None


class Flight:
    """A request between `ask` and `end`. `places` are the chosen endpoint and those to try after it.

    `settle` is called once if the request had to wait: places are set, or `refused` is.
    """

    __slots__ = (
        "asked",
        "body",
        "entry",
        "events",
        "gone",
        "kind",
        "late",
        "places",
        "preparing",
        "query",
        "refused",
        "settle",
        "status",
        "stream",
        "ticket",
        "tokenised",
    )

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.kind = ""
        self.body: Body | None = None
        self.query: Query | None = None
        self.preparing = self.late = self.tokenised = self.gone = False
        self.ticket: Ticket | None = None
        self.events = 0  # of a stream
        self.places: tuple[str, ...] = ()
        self.entry: Waiting | None = None
        self.refused: Refused | None = None
        self.settle: Callable[[], None] = lambda: None
        self.stream = False
        self.status = 0

    @property
    def waiting(self) -> bool:
        """Neither placed nor refused yet."""
        return not self.places and self.refused is None
