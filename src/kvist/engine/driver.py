"""An engine in real time: steps end when their modelled duration has passed, on an absolute schedule.

`speed` makes modelled seconds pass faster: at 10, a step of 30 ms takes 3 ms of wall time. A step begins
where the last one ended on the modelled clock: a late wake-up delays an answer but does not slow the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from kvist.engine.core import Engine
from kvist.engine.request import Request
from kvist.model import Query

Tokens = Callable[[Request, bool], None]  # one more token; True: it was the last


class Driver:
    """Runs inside an event loop. Raises ValueError for a speed that is not above 0."""

    def __init__(self, engine: Engine, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed}")
        self.engine = engine
        self.speed = speed
        self._start = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._end = 0.0

    def now(self) -> float:
        """The modelled clock, in seconds since the start."""
        return (time.monotonic() - self._start) * self.speed

    def submit(self, query: Query, tokens: Tokens) -> Request:
        """Queue a query; `tokens` hears of each of its tokens. Raises kvist.engine.request.Refused."""
        now = self.now()
        query.arrival = now
        request = self.engine.submit(query, now)
        request.tag = tokens
        if self._timer is None:
            self._begin(now)
        return request

    def abort(self, request: Request) -> None:
        """The client left; nothing is told of the request any more."""
        request.tag = None
        self.engine.abort(request)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self, now: float) -> None:
        duration = self.engine.begin_step(now)
        if duration is None:
            self._timer = None
            return
        self._end = now + duration
        left = (self._end - self.now()) / self.speed
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(left, 0.0), self._finish)

    def _finish(self) -> None:
        end = self._end
        result = self.engine.end_step(end)
        finished = set(result.finished)
        for group in (result.first, result.decoded):
            for request in group:
                if request.tag is not None:
                    request.tag(request, request in finished)
        # After an idle spell or a stall the clock has run ahead: begin no step in the past of more than one.
        self._begin(end if self.now() - end < 1.0 else self.now())
