"""The leaves that marking may evict: asked for in neither of the last two phases, or in the previous one."""

from __future__ import annotations

from random import Random

from kvist.prefix.tree import Node


class Pools:
    """Leaves are cached nodes; their records (cache/history.py) say which pool they are in. All O(1)."""

    def __init__(self) -> None:
        self._ancient: list[Node] = []
        self._unmarked: list[Node] = []

    def join(self, leaf: Node, phase: int) -> None:
        """Put a leaf where it belongs in `phase`; nowhere, if that has asked for it."""
        record = leaf.state.state
        if record.phase == phase:
            return
        pool = self._unmarked if record.phase == phase - 1 else self._ancient
        record.pool = pool
        leaf.ticket = len(pool)
        pool.append(leaf)

    def leave(self, leaf: Node) -> None:
        record = leaf.state.state
        pool, record.pool = record.pool, None
        if pool is not None:
            last = pool.pop()
            if last is not leaf:
                pool[leaf.ticket] = last
                last.ticket = leaf.ticket

    def draw(self, rng: Random) -> Node | None:
        """A uniformly random ancient leaf, else a uniformly random unmarked one; None if there is neither."""
        pool = self._ancient or self._unmarked
        return pool[int(rng.random() * len(pool))] if pool else None

    def clear(self) -> None:
        for pool in (self._ancient, self._unmarked):
            for leaf in pool:
                leaf.state.state.pool = None
            pool.clear()
