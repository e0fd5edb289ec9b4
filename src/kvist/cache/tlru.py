"""T-LRU, tail-optimized LRU: first evict what the next turn's time to first token can spare.

A conversation of L tokens whose next prompt adds Q tokens stays below a prefill of X tokens as long as
L + Q - X of it are cached. What lies behind is evicted first, the least recently used conversation first;
then the rest goes in order of recency.
"""

from __future__ import annotations

from kvist.cache.cache import PrefixCache
from kvist.cache.recency import UsagePolicy
from kvist.prefix.tree import Node


class TLRU(UsagePolicy):
    """node.state: (blocks up to the node's start, blocks of the last request that went through it)."""

    name = "t-lru"
    description = "Evict what a conversation's next first token can spare, then the least recently used."
    source = (
        "Zhang et al., arXiv 2510.15152 (NeurIPS 2025); SGLang mem_cache tlru. On a tree: the last request "
        "through a block says how long its conversation is; block by block, not whole nodes"
    )
    params = {
        "threshold": "tokens that may be prefilled without harm (1024)",
        "next_prompt": "tokens that a next turn is expected to add (256)",
    }

    def __init__(self, *, threshold: int = 1024, next_prompt: int = 256, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if threshold < 0 or next_prompt < 0:
            raise ValueError("threshold and next_prompt must be at least 0 tokens")
        self._tokens = max(threshold - next_prompt, 0)

    def attach(self, cache: PrefixCache) -> None:
        super().attach(cache)
        self._spare = self._tokens // cache.block_size

    def hit(self, node: Node, now: float) -> None:
        super().hit(node, now)
        self._end(node)

    def insert(self, node: Node, now: float) -> None:
        super().insert(node, now)
        parent = node.parent
        assert parent is not None
        node.state = (parent.state[0] + parent.size if parent.state else 0, 0)
        self._end(node)

    def split(self, upper: Node, lower: Node) -> None:
        super().split(upper, lower)
        start, length = lower.state
        upper.state, lower.state = (start, length), (start + upper.size, length)

    def priority(self, node: Node) -> tuple[bool, float]:
        return self._safe(node) <= 0, node.last

    def portion(self, node: Node) -> int:
        safe = self._safe(node)
        return min(node.size, safe) if safe > 0 else node.size

    def _safe(self, node: Node) -> int:
        """Blocks at the end of a leaf that its conversation can spare."""
        start, length = node.state
        return int(start + node.size - max(length - self._spare, 0))

    def _end(self, node: Node) -> None:
        """The request being served reaches this far."""
        length = node.state[0] + node.size
        at: Node | None = node
        while at is not None and at.parent is not None:
            at.state = (at.state[0], length)
            at = at.parent
