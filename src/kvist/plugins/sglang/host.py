"""SGLang's tree as the core's policies see it.

A policy works on the engine's own nodes: `adopt` gives them the fields of `kvist.prefix.tree.Node` that
belong to the policy, so there is no second tree. The policy's host is a `PrefixCache` whose removals go to
the engine. Block = page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvist.cache import EvictionPolicy, PrefixCache
from kvist.cache.events import CacheEvent
from kvist.prefix.tree import Node, RadixTree

_SHARED = ("key", "parent", "children")  # the engine's own; policies read them
_FRESH = {field: getattr(Node(b"", 0, b"", None), field) for field in Node.__slots__ if field not in _SHARED}


def adopt(node: Any, blocks: int) -> None:
    """Give an engine's node the policy's fields."""
    vars(node).update(_FRESH, size=blocks)


class Leaves(set[Any]):
    """SGLang's set of evictable leaves, which it keeps itself; the policy hears of every change."""

    def __init__(self, policy: EvictionPolicy, arrive: Callable[[Any], None]) -> None:
        super().__init__()
        self._policy, self._arrive = policy, arrive

    def add(self, node: Any) -> None:
        super().add(node)
        if "slot" not in vars(node):
            self._arrive(node)
        self._policy.candidate(node)

    def remove(self, node: Any) -> None:
        super().remove(node)
        self._policy.retract(node)


def _unheard(event: CacheEvent) -> None:
    """The engine sends KV events of its own; that somebody listens makes policies report each removal."""


class EngineTree(RadixTree):
    """The two structural changes that policies make by themselves, carried to the engine."""

    drop: Callable[[Any], None]

    def unlink(self, node: Node) -> None:
        self.drop(node)

    def shrink_key(self, node: Node) -> None:
        """The engine's key shrinks in `PolicyHost.removed`."""


class PolicyHost(PrefixCache):
    """What a policy calls `cache`, in an engine that holds the tree.

    shrink(node, keep): the engine frees all but the first `keep` blocks of a leaf.
    drop(node): the engine unlinks a leaf without blocks.
    """

    tree: EngineTree
    tree_class = EngineTree

    def __init__(
        self,
        capacity: int,
        eviction: EvictionPolicy,
        block_size: int,
        *,
        shrink: Callable[[Any, int], None],
        drop: Callable[[Any], None],
    ) -> None:
        super().__init__(
            max(capacity, block_size), eviction, block_size=block_size, unit=1, on_event=_unheard
        )
        self.tree.drop = drop
        self.removed = shrink  # type: ignore[assignment, method-assign]  # hot: once a leaf cut

    def trim(self, node: Node, blocks: int) -> None:
        node.size -= blocks
        self.tree.total -= blocks
        self.removed(node, node.size)
        if not node.size:
            self.tree.unlink(node)
