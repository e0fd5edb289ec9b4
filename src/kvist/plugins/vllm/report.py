"""What the plugin says in vLLM's log: at the first eviction, then at most every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvist.plugins.vllm.tree import BlockTree

INTERVAL = 10.0  # seconds


class Report:
    def __init__(self, cached: BlockTree, say: Callable[[str], None]) -> None:
        self._cached = cached
        self._say = say
        self._next = 0.0

    def evicted(self) -> None:
        """Blocks were evicted: say so if the last report is long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL
        cached, policy = self._cached, self._cached.eviction
        phase = getattr(policy, "phase", None)
        self._say(
            f"kvist: {policy.name} evicted {cached.evicted_blocks} blocks so far"
            + (f" in {phase + 1} phases" if phase is not None else "")
            + f"; {cached.tree.total} of {cached.capacity_blocks} blocks cached, {cached.tree.locked} in use"
        )
