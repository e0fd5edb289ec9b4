"""Families without a benchmark of their own: chats, rag, agents, tenants, scan. All generated."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from random import Random

from kvist.model import Query
from kvist.workloads.base import UNIQUE, Filler, Workload, poisson


class Mix(Workload):
    """Base: a generator of (prompt, session, salt), at Poisson arrivals."""

    source = "kvist"
    params = {"requests": "requests (2000)"}
    structure = ""

    def __init__(self, *, requests: int = 2000, rate: float | None = None, seed: int = 0) -> None:
        super().__init__(rate=12.0 if rate is None else rate, seed=seed)
        if requests < 1:
            raise ValueError(f"{self.name}: requests must be at least 1")
        self.requests = requests

    @property
    def total(self) -> int:
        return self.requests

    def describe(self) -> str:
        return f"{self.name}, generated: {self.requests} requests, {self.structure}"

    def __iter__(self) -> Iterator[Query]:
        rng = Random(f"{self.seed}/{self.name}")
        assert self.rate is not None
        arrivals = poisson(self.rate, Random(f"{self.seed}/{self.name}/arrivals"))
        stream = self.stream(rng, Pieces(self.seed))
        for number, arrival, (prompt, session, salt) in zip(
            range(self.requests), arrivals, stream, strict=False
        ):
            yield Query(number, prompt, 4, arrival, salt=salt, session=session)

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        raise NotImplementedError


class Pieces:
    """Token material: `named` pieces come back for the same number, `fresh` ones never."""

    def __init__(self, seed: int) -> None:
        self._filler = Filler(seed)
        self._next = UNIQUE

    def named(self, number: int, tokens: int) -> bytes:
        return self._filler.piece(number, tokens)

    def fresh(self, tokens: int) -> bytes:
        self._next += 1
        return self._filler.piece(self._next, tokens)


class Chats(Mix):
    name = "chats"
    description = "Conversations whose users come back after a pause: soon as a rule, late at times."
    structure = "8 system prompts, 6 turns in the mean, pauses of log-normal length, half below 55 requests"

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        systems = [pieces.named(i, rng.choice((64, 256, 800))) for i in range(8)]
        paused: list[tuple[int, str, bytes]] = []  # due, conversation, text
        for now in count():
            if paused and paused[0][0] <= now:
                _, session, text = heappop(paused)
            else:
                session, text = f"chat{now}", rng.choice(systems)
            text += pieces.fresh(_tokens(rng, 90))
            yield text, session, b""
            if rng.random() < 5 / 6:
                pause = 1 + int(rng.lognormvariate(4, 1.5))
                heappush(paused, (now + pause, session, text + pieces.fresh(_tokens(rng, 180))))


def _tokens(rng: Random, typical: int) -> int:
    return min(max(round(typical * rng.lognormvariate(0, 1)), 8), 2000)


class RAG(Mix):
    name = "rag"
    description = "Retrieval: system prompt, documents of Zipf popularity that drifts, a question."
    params = {
        **Mix.params,
        "picks": "documents in a prompt (2)",
        "drift": "share of the ranks redrawn every 100 requests (0.1)",
    }

    def __init__(
        self,
        *,
        picks: int = 2,
        drift: float = 0.1,
        requests: int = 2000,
        rate: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(requests=requests, rate=rate, seed=seed)
        if picks < 1 or not 0 <= drift <= 1:
            raise ValueError("rag: picks must be at least 1, and drift from 0 to 1")
        self.picks, self.drift = picks, drift
        self.structure = f"400 documents, {drift:.0%} of the ranks redrawn every 100 requests"

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        ranked = list(range(400))
        rng.shuffle(ranked)
        weights = [1 / (rank + 1) for rank in range(400)]
        sizes = [rng.choice((512, 1024, 2048)) for _ in range(400)]
        system = pieces.named(1000, 256)
        for number in range(self.requests):
            if number % 100 == 99:
                for _ in range(round(400 * self.drift)):
                    a, b = rng.randrange(400), rng.randrange(400)
                    ranked[a], ranked[b] = ranked[b], ranked[a]
            ranks = sorted(set(rng.choices(range(400), weights, k=self.picks)))
            documents = b"".join(pieces.named(ranked[i], sizes[ranked[i]]) for i in ranks)
            yield system + documents + pieces.fresh(64), "", b""


class Agents(Mix):
    name = "agents"
    description = "Agents that explore: each step extends the last state or goes back to an earlier one."
    structure = "12 tasks at once, one in 16 steps ends a task"

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        tools = [pieces.named(i, 1024) for i in range(3)]
        started = 0
        tasks: list[tuple[str, list[bytes]]] = []
        while True:
            while len(tasks) < 12:
                started += 1
                tasks.append((f"task{started}", [rng.choice(tools) + pieces.fresh(256)]))
            at = rng.randrange(len(tasks))
            session, states = tasks[at]
            state = states[-1] if rng.random() < 0.75 else rng.choice(states)
            states.append(state + pieces.fresh(rng.choice((64, 128, 512))))
            yield states[-1], session, b""
            if rng.random() < 1 / 16:
                del tasks[at]


class Tenants(Mix):
    name = "tenants"
    description = "Three tenants kept apart: chats, form letters, a batch in which nothing comes back."
    structure = "half chat, 3 in 10 templates, 2 in 10 batch"

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        forms = [pieces.named(i, rng.choice((512, 2048))) for i in range(40)]
        chats: list[tuple[str, bytes]] = []
        started = 0
        while True:
            kind = rng.random()
            if kind < 0.5:
                while len(chats) < 24:
                    started += 1
                    chats.append((f"chat{started}", b""))
                at = rng.randrange(len(chats))
                session, history = chats[at]
                history += pieces.fresh(rng.choice((128, 256, 512)))
                chats[at] = session, history
                yield history, session, b"chat"
                if rng.random() < 0.2:
                    del chats[at]
            elif kind < 0.8:
                yield rng.choice(forms) + pieces.fresh(128), "", b"forms"
            else:
                yield pieces.fresh(2048), "", b"batch"


class Scan(Mix):
    name = "scan"
    description = "A job that goes through the same documents round and round, among requests seen once."
    structure = "250 documents, a fifth of the requests once only"

    def stream(self, rng: Random, pieces: Pieces) -> Iterator[tuple[bytes, str, bytes]]:
        sizes = [rng.choice((512, 1024)) for _ in range(250)]
        at = 0
        while True:
            if rng.random() < 0.2:
                yield pieces.fresh(1024), "", b""
            else:
                yield pieces.named(at, sizes[at]) + pieces.fresh(32), f"document{at}", b""
                at = (at + 1) % 250
