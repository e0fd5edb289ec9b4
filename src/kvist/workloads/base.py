"""What a workload is: a stream of queries in order of arrival that can be started again and again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from random import Random
from typing import ClassVar

import numpy as np

from kvist.model import Query

UNIQUE = 1 << 30  # numbers from here on name pieces of content that occur once


class Workload(ABC):
    """Base of all workloads. Iterating yields Query objects lazily, the same ones for the same seed."""

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    params: ClassVar[dict[str, str]] = {}

    def __init__(self, *, rate: float | None, seed: int) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(f"rate must be above 0 requests/s, not {rate}")
        self.rate = rate
        self.seed = seed

    @abstractmethod
    def __iter__(self) -> Iterator[Query]: ...

    @abstractmethod
    def describe(self) -> str:
        """One line: what this is, and whether from a file or from a generator."""

    @property
    def total(self) -> int | None:
        """Number of queries where it is known beforehand."""
        return None


def poisson(rate: float, rng: Random) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process."""
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


class Filler:
    """Token material: pieces of any length that differ from the first token on if their numbers differ.

    Two prompts share exactly the pieces they were built from. Costs a slice, not a random draw a token.
    """

    _SIZE = 1 << 20

    def __init__(self, seed: int) -> None:
        pool = np.random.default_rng(seed).integers(0, 1 << 32, size=self._SIZE, dtype=np.uint32)
        self._pool = pool.astype("<u4").tobytes()

    def piece(self, number: int, tokens: int) -> bytes:
        """Packed token ids: `tokens` of them, the first one is `number`."""
        if tokens < 1:
            return b""
        start = number * 7919 % (self._SIZE // 2)
        body = self._pool[4 * start : 4 * (start + tokens - 1)]
        while len(body) < 4 * (tokens - 1):  # longer than the pool: go round
            body += self._pool[: 4 * (tokens - 1) - len(body)]
        return number.to_bytes(4, "little") + body


def text_tokens(text: str) -> bytes:
    """Text as packed tokens without a tokenizer: four bytes of UTF-8 are one token.

    Equal text gives equal tokens, and about as many as a tokenizer gives for English. Padded with zero bytes
    to whole tokens, so that pieces can be strung together.
    """
    data = text.encode("utf-8", "surrogatepass")
    return data + bytes(-len(data) % 4)


def fit(tokens: bytes, length: int) -> bytes:
    """Exactly `length` tokens: cut, or repeated as often as it takes."""
    size = 4 * length
    if not tokens:
        tokens = bytes(4)
    while len(tokens) < size:
        tokens += tokens[: size - len(tokens)]
    return tokens[:size]
