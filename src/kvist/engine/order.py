"""In which order waiting requests are admitted: one small strategy each, by name in `ORDERS`.

An order says which waiting request comes next; the engine stops admitting at the first that does not fit, as
vLLM does, so that a long request cannot starve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from kvist.engine.core import Engine
    from kvist.engine.request import Request

LOOKAHEAD = 128  # waiting requests looked at, so that a pick costs no more under overload


class QueueOrder(ABC):
    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    params: ClassVar[dict[str, str]] = {}
    reorders: ClassVar[bool] = True  # a later arrival may come first

    @abstractmethod
    def pick(self, engine: Engine, now: float) -> int:
        """Position in engine.waiting (not empty) of the request to admit next."""


class FCFS(QueueOrder):
    name = "fcfs"
    description = "First come, first served."
    source = "vLLM V1 scheduler"
    reorders = False

    def pick(self, engine: Engine, now: float) -> int:
        return 0


class LongestPrefix(QueueOrder):
    name = "lpm"
    description = "Longest cached prefix first, the oldest among equals; by age while more than 128 wait."
    source = (
        "SGLang schedule_policy.py (lpm, first come first served above 128); Zheng et al. 2024, section 3"
    )

    def pick(self, engine: Engine, now: float) -> int:
        return 0 if len(engine.waiting) > LOOKAHEAD else self.longest(engine)

    @staticmethod
    def longest(engine: Engine) -> int:
        peek = engine.cache.peek
        hits = [peek(r.query.prompt, r.query.salt) for r in islice(engine.waiting, LOOKAHEAD)]
        return hits.index(max(hits))


class KLongestPrefix(LongestPrefix):
    name = "k-lpm"
    description = "k picks by longest prefix, then the oldest request: bounded waiting."
    source = "k-LPM, LLM Query Scheduling with Prefix Reuse and Latency Constraints, arXiv 2502.04677"
    params = {"k": "picks by prefix between two picks by age (4)"}

    def __init__(self, k: int = 4) -> None:
        if k < 1:
            raise ValueError(f"k-lpm: k must be at least 1, not {k}")
        self.k = k
        self._picks = 0

    def pick(self, engine: Engine, now: float) -> int:
        self._picks += 1
        return 0 if self._picks % (self.k + 1) == 0 else self.longest(engine)


class LeastSlack(QueueOrder):
    name = "slo"
    description = "Least slack to the TTFT target first; requests past saving go behind those that are not."
    source = "least-laxity-first scheduling, with uncached prefill as the work that is left"
    params = {"ttft": "target time to first token in seconds (2.0)"}

    def __init__(self, ttft: float = 2.0) -> None:
        if ttft <= 0:
            raise ValueError(f"slo: ttft must be above 0 seconds, not {ttft}")
        self.ttft = ttft

    def pick(self, engine: Engine, now: float) -> int:
        best, choice = (True, float("inf")), 0
        for position, request in enumerate(islice(engine.waiting, LOOKAHEAD)):
            query = request.query
            hit = engine.cache.peek(query.prompt, query.salt)
            new = max(query.length + request.generated - hit, 1)
            work = engine.profile.step(new, new * (hit + new / 2), 0, 0)
            slack = request.submitted + self.ttft - now - work
            rank = (slack < 0, slack if slack >= 0 else work)
            if rank < best:
                best, choice = rank, position
        return choice


class ShortestPrefill(QueueOrder):
    name = "shortest"
    description = "Least uncached prompt first, aged so that nobody starves."
    source = "shortest-job-first with aging"
    params = {"aging": "uncached tokens that a second of waiting is worth (1000)"}

    def __init__(self, aging: float = 1000.0) -> None:
        if aging < 0:
            raise ValueError(f"shortest: aging must be at least 0 tokens a second, not {aging}")
        self.aging = aging

    def pick(self, engine: Engine, now: float) -> int:
        def rank(request: Request) -> float:
            query = request.query
            left = query.length - engine.cache.peek(query.prompt, query.salt)
            return left - self.aging * (now - request.submitted)

        ranks = [rank(request) for request in islice(engine.waiting, LOOKAHEAD)]
        return ranks.index(min(ranks))


ORDERS: dict[str, type[QueueOrder]] = {
    order.name: order for order in (FCFS, LongestPrefix, KLongestPrefix, ShortestPrefill, LeastSlack)
}


def make_order(name: str, **params: Any) -> QueueOrder:
    """A new queue order by name. Raises ValueError for an unknown name or parameter."""
    if name not in ORDERS:
        raise ValueError(f"unknown queue order {name!r}: choose one of {', '.join(ORDERS)}")
    try:
        return ORDERS[name](**params)
    except TypeError as error:
        raise ValueError(f"queue order {name}: {error}") from None
