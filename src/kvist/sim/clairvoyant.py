"""Routers that know what no router can: a bound to measure the others against, in the simulator only.

`clairvoyant` reads the engines' true state at the moment of routing: what every cache holds or will hold once
those in the queue are computed, the exact work that is left, every request's output length, the latency
profile. It plays each candidate's batches forward and takes the smallest sum of this request's own time to
first token and `price` times the computing seconds it adds for each of those it delays. price=0 is greedy:
the best for this request, whatever it costs those behind it.

It knows the present exactly and the future not at all, and it decides request by request: a strong reference,
not a proven optimum.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from math import sqrt
from random import Random
from typing import TYPE_CHECKING

from kvist.engine.core import Engine
from kvist.engine.request import Request, State
from kvist.model import Query
from kvist.prefix.tree import common_prefix
from kvist.routing.base import Candidate, Decision, RoutingPolicy, Ticket
from kvist.routing.choice import smallest

if TYPE_CHECKING:
    from kvist.sim.cluster import Cluster

STEPS = 256  # played forward; what is left then goes at the pace of the last step


class Clairvoyant(RoutingPolicy):
    name = "clairvoyant"
    description = "Knows true caches, queues and service times (simulator only): a bound for the others."
    source = "own; plays the engine model of kvist.engine.core forward"
    params = {"price": "seconds charged per computing second and request delayed (1.0); 0: greedy"}
    needs_index = False

    def __init__(self, *, price: float = 1.0, rng: Random | None = None) -> None:
        super().__init__(rng=rng)
        if price < 0:
            raise ValueError(f"price must be at least 0, not {price}")
        self.price = price
        self.cluster: Cluster | None = None
        self._new: dict[str, dict[int | str, int]] = {}  # worker -> waiting query -> tokens it must compute
        self._found: dict[str, int] = {}

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        assert self.cluster is not None, "only in the simulator"
        ends = {worker.spec.id: time for time, _, worker in self.cluster.agenda}
        delays, costs = [], []
        self._found = {}
        for candidate in candidates:
            name = candidate.worker.id
            engine = self.cluster.workers[name].engine
            new = query.length - true_hit(engine, query)
            self._found[name] = new
            begin = max(ends.get(name, now), now) if engine.stepping else now
            delays.append(begin - now + self._forward(engine, query, new, self._new.setdefault(name, {})))
            own = engine.profile.step(new, new * (query.length - new / 2), 0, 0)
            costs.append(own)
        waiting = [candidate.worker.waiting for candidate in candidates]
        many = self.price * sqrt(min(waiting) * sum(waiting) / len(waiting))
        mean = sum(costs) / len(costs)
        pace = mean * len(candidates) / max(sum(self._found.values()), 1)
        scores = [
            delay + many * pace * self._found[c.worker.id]
            for delay, c in zip(delays, candidates, strict=True)
        ]
        return smallest(scores, candidates, self.rng, reason="smallest true cost")

    def dispatched(self, ticket: Ticket, now: float) -> None:
        self._new[ticket.worker.id][ticket.query.id] = self._found[ticket.worker.id]

    def first_token(self, ticket: Ticket, now: float) -> None:
        self._new[ticket.worker.id].pop(ticket.query.id, None)

    @staticmethod
    def _forward(engine: Engine, query: Query, new: int, known: dict[int | str, int]) -> float:
        """Seconds from the next step's begin to the query's first token."""
        cache, profile = engine.cache, engine.profile
        room = cache.capacity - (cache.tree.locked + cache.reserved_blocks) * cache.block_size
        # Prefills in order: (tokens to compute, context before them, tokens of room they need, output).
        queue: list[list[int]] = []
        ends: list[tuple[int, int]] = []  # decodes: (steps left, tokens set free)
        kv = 0
        for request in engine.running:
            length = request.query.length
            if request.state is State.DECODE:
                done = engine.generated(request)
                insort(ends, (request.query.output_tokens - done, length + done))
                kv += length + done
        for request in engine._prefilling:
            left = request.query.length + request.generated - request.computed
            queue.append([left, request.computed, 0, _output(request)])
        for request in engine.waiting:
            length = request.query.length + request.generated
            todo = min(max(known.get(request.query.id, length), 1), length)
            queue.append([todo, length - todo, todo, _output(request)])
        new = max(new, 1)
        queue.append([new, query.length - new, new, query.output_tokens])
        at, admitted, step, time, pace = 0, 0, 0, 0.0, 0.0
        while True:
            decodes = len(ends)
            budget = engine.max_num_batched_tokens - decodes
            tokens, work = 0, 0.0
            position = at
            while budget > 0 and position < len(queue):
                todo, before, need, _ = queue[position]
                if position >= admitted:
                    if need > room and ends:
                        break
                    room -= need
                    admitted = position + 1
                chunk = min(todo, budget)
                work += chunk * (before + chunk / 2)
                queue[position][0] -= chunk
                queue[position][1] += chunk
                budget -= chunk
                tokens += chunk
                position += 1
            pace = profile.step(tokens + decodes, work, kv, decodes)
            time += pace
            step += 1
            kv += decodes
            while at < len(queue) and queue[at][0] == 0:
                length, output = queue[at][1], queue[at][3]
                at += 1
                if at == len(queue):
                    return time
                if output > 1:
                    insort(ends, (step + output - 1, length))
                    kv += length
                else:
                    room += queue[at - 1][2]
            over = bisect_left(ends, (step + 1, 0))
            for left, free in ends[:over]:
                room += free
                kv -= free + left
            del ends[:over]
            kv = max(kv, 0)
            if step >= STEPS:
                rest = sum(todo for todo, _, _, _ in queue[at:])
                return time + pace * rest / max(tokens, 1)


def _output(request: Request) -> int:
    return max(request.query.output_tokens - request.generated, 1)


def true_hit(engine: Engine, query: Query) -> int:
    """Tokens of the prompt that the cache holds, or will once those ahead in the queue are computed."""
    hit = engine.cache.peek(query.prompt, query.salt)
    prompt, unit = query.prompt, query.unit
    for ahead in (*engine._prefilling, *engine.waiting):
        other = ahead.query
        if other.salt == query.salt and other.prompt[:unit] == prompt[:unit]:
            limit = min(len(prompt), len(other.prompt))
            if limit > hit * unit:
                hit = max(hit, common_prefix(prompt, 0, other.prompt, limit) // unit)
    return min(hit, query.length - 1)
