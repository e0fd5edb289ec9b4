"""What a router asks of an index: how long a prefix of this prompt does each worker hold?"""

from __future__ import annotations

from typing import Protocol

from kvist.model import Query


class PrefixKnowledge(Protocol):
    """Workers are named by slot, a small non-negative integer. Lengths are in tokens."""

    def add_worker(self, slot: int, capacity: int) -> None:
        """A worker joins with nothing cached; `capacity` in tokens, 0 if unknown."""

    def set_capacity(self, slot: int, capacity: int) -> None:
        """The worker's capacity became known, in tokens."""

    def remove_worker(self, slot: int) -> None:
        """Forget all that the worker held."""

    def match(self, query: Query, slots: int, now: float) -> list[int]:
        """Cached prompt tokens by slot, a list of `slots` integers."""

    def routed(self, query: Query, slot: int, now: float) -> None:
        """The query was sent to the worker, which will cache its prompt."""

    def answered(
        self, query: Query, slot: int, expected: int, cached: int | None, output: int, now: float
    ) -> None:
        """The query ended well: `expected` tokens were thought cached, the engine counted `cached`.

        output: tokens of the answer as the engine counted them, 0 if it did not say.
        """

    def dropped(self, query: Query, slot: int, now: float) -> None:
        """The query failed or its client left, so the worker may never cache its prompt."""

    def cached_tokens(self, slot: int) -> int:
        """Tokens the worker is believed to hold."""
