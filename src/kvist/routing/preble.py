"""Preble's E2 rule: exploit a long cached prefix, else explore by windowed cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from kvist.model import Query, WorkerState
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.choice import smallest


class _Load:
    """What a worker was given in the window, in uncached tokens; and how much of its prompts was cached."""

    __slots__ = ("cached", "cost", "recent", "tokens")

    def __init__(self) -> None:
        self.recent: deque[tuple[float, float, int, int]] = deque()
        self.cost = 0.0
        self.tokens = self.cached = 0

    def add(self, now: float, cost: float, tokens: int, cached: int) -> None:
        self.recent.append((now, cost, tokens, cached))
        self.cost += cost
        self.tokens += tokens
        self.cached += cached

    def forget(self, before: float) -> None:
        while self.recent and self.recent[0][0] < before:
            _, cost, tokens, cached = self.recent.popleft()
            self.cost -= cost
            self.tokens -= tokens
            self.cached -= cached
        if not self.recent:
            self.cost = 0.0  # no rounding is left behind

    @property
    def hit_rate(self) -> float:
        return self.cached / self.tokens if self.tokens else 0.0


class Preble(RoutingPolicy):
    """Costs are counted in uncached prompt tokens where Preble uses times that were fitted for one GPU.

    Load: the uncached tokens of the window's requests plus their expected outputs. Eviction: memory counts as
    full, so a request pushes out as many tokens as it brings, of which the worker's hit rate says how many
    will be computed again. Adjustment: while the most loaded worker has more than `balance` times the load of
    the least, what would go to the former goes to the latter.
    """

    name = "preble"
    description = "Longest prefix if it exceeds the rest of the prompt, else least load + eviction + prefill."
    source = "Srivatsa et al. 2024, arXiv 2407.00023; WukLab/preble global_scheduler_with_time.py"
    params = {
        "window": "seconds of requests that count as load (180)",
        "balance": "load of the most over the least loaded worker from which requests are moved (1.5)",
        "decode_weight": "uncached tokens that an output token counts as much as (8)",
    }

    def __init__(
        self,
        *,
        window: float = 180.0,
        balance: float = 1.5,
        decode_weight: float = 8.0,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if window <= 0 or balance < 1 or decode_weight < 0:
            raise ValueError("window must be above 0, balance at least 1, decode_weight at least 0")
        self.window = window
        self.balance = balance
        self.decode_weight = decode_weight
        self._loads: dict[str, _Load] = {}
        self._output = 1.0  # mean output tokens

    def worker_added(self, worker: WorkerState, now: float) -> None:
        self._loads[worker.id] = _Load()

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        self._loads.pop(worker.id, None)

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        loads = []
        for candidate in candidates:
            load = self._loads[candidate.worker.id]
            load.forget(now - self.window)
            loads.append(load.cost)
        longest = max(candidate.cached for candidate in candidates)
        if longest > query.length - longest:
            held = [
                load if c.cached == longest else float("inf")
                for c, load in zip(candidates, loads, strict=True)
            ]
            decision = smallest(held, candidates, self.rng, reason="exploit: longest prefix")
        else:
            costs = [
                cost + (query.length - c.cached) * (1.0 + self._loads[c.worker.id].hit_rate)
                for c, cost in zip(candidates, loads, strict=True)
            ]
            decision = smallest(costs, candidates, self.rng, reason="explore: load + eviction + prefill")
        low, high = min(loads), max(loads)
        chosen = next(i for i, c in enumerate(candidates) if c.worker.id == decision.worker)
        if loads[chosen] == high > self.balance * max(low, float(query.length)):
            idlest = candidates[loads.index(low)]
            return Decision(idlest.worker.id, idlest.cached, None, loads, "out of balance: least load")
        decision.scores = loads
        return decision

    def dispatched(self, ticket: Ticket, now: float) -> None:
        cached, length = ticket.decision.cached, ticket.query.length
        cost = length - cached + self.decode_weight * self._output
        self._loads[ticket.worker.id].add(now, cost, length, cached)

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        if outcome.status is Status.OK and outcome.output_tokens > 0:
            self._output += 0.02 * (outcome.output_tokens - self._output)
