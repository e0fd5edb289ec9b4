"""What an eviction policy is.

A cached token can leave only when no cached token extends it, so every policy is a rule over *leaf* blocks:
the last block of a leaf node that no running request locks (a *candidate*). The cache tells the policy of
every event; when room is needed it calls `evict`, and the policy answers through `cache.trim(node, blocks)`.
Lengths are in blocks here. `now` is the time the host gives (seconds, or a request count).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from random import Random
from typing import TYPE_CHECKING, ClassVar

from kvist.prefix.tree import Node

if TYPE_CHECKING:
    from kvist.cache.cache import PrefixCache
    from kvist.model import Query


class EvictionPolicy(ABC):
    """Base of all eviction policies. Only the hooks a policy needs are overridden.

    Order of calls for one request: begin, hit (each matched node, root side first; a node split by a partial
    match is announced by `split` before), then possibly evict, then insert (the new node), candidate /
    retract whenever a node becomes or stops being an unlocked leaf, remove when its last block has gone.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    params: ClassVar[dict[str, str]] = {}

    cache: PrefixCache

    def __init__(self, *, rng: Random | None = None) -> None:
        self.rng = rng if rng is not None else Random(0)

    def attach(self, cache: PrefixCache) -> None:
        """Called once, before anything else."""
        self.cache = cache

    def begin(self, query: Query | None, now: float) -> None:
        """A request starts being served; `query` is None where the host has only a prompt."""

    def hit(self, node: Node, now: float) -> None:
        """Every block of `node` was matched by the request being served."""

    def touch(self, node: Node, now: float) -> None:
        """`node` was seen again by the request being served (its insertion): recent, but no new hit."""

    def insert(self, node: Node, now: float) -> None:
        """`node` is new, all its blocks belong to the request being served."""

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` is new and took over the front of `lower`: copy per-node state to it."""

    def candidate(self, node: Node) -> None:
        """`node` became an unlocked leaf: its last block may be evicted."""

    def retract(self, node: Node) -> None:
        """`node` was a candidate and is none any more (locked, extended, or removed)."""

    def remove(self, node: Node) -> None:
        """The last block of `node` has gone (after `retract`)."""

    def settle(self, node: Node) -> None:
        """Write a size this policy keeps for `node` (node.slot >= 0) back to node.size; see cache/rlt.py."""

    @abstractmethod
    def evict(self, blocks: int) -> int:
        """Free up to `blocks` blocks now, through `cache.trim`; the number freed (fewer: all is locked)."""

    def reset(self) -> None:
        """The cache was emptied: forget every node."""
