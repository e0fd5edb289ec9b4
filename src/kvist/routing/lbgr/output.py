"""How many tokens an answer will have: a running mean by model, tenant and prompt length."""

from __future__ import annotations

from kvist.model import Query

MOST = 4096  # keys that are kept
Key = tuple[str, str, int]


class OutputLengths:
    def __init__(self) -> None:
        self._means: dict[Key, tuple[float, int]] = {}
        self._all = (1.0, 0)

    def expect(self, query: Query) -> float:
        """Tokens, at least 1."""
        return (self._means.get(_key(query)) or self._all)[0]

    def learn(self, query: Query, tokens: int) -> None:
        if tokens < 1:
            return
        key = _key(query)
        self._all = _step(self._all, tokens)
        self._means[key] = _step(self._means.pop(key, (1.0, 0)), tokens)  # the newest last
        if len(self._means) > MOST:
            del self._means[next(iter(self._means))]


def _key(query: Query) -> Key:
    return query.model, query.tenant, query.length.bit_length()


def _step(mean: tuple[float, int], tokens: int) -> tuple[float, int]:
    value, count = mean[0], mean[1] + 1
    return value + (tokens - value) * max(0.02, 1 / count), count
