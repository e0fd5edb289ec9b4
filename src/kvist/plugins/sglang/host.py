"""SGLang's tree as the core's policies see it: for each of the engine's nodes one of the core's.

Both trees have the same shape, so a change of one is O(1) in the other; nothing is looked up or walked. The
policy's host is a `PrefixCache` whose removals and cuts go to the engine. Block = page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvist.cache import EvictionPolicy, PrefixCache
from kvist.cache.events import CacheEvent
from kvist.prefix.tree import Node, RadixTree


class EngineNode(Node):
    """The core's side of the engine's node `engine`; the engine's side holds this one as `twin`."""

    __slots__ = ("engine",)

    def __init__(self, key: bytes, blocks: int, first: bytes, parent: Node, engine: Any) -> None:
        super().__init__(key, blocks, first, parent)
        self.engine = engine
        engine.twin = self


class Leaves(set[Any]):
    """SGLang's set of evictable leaves, which it keeps itself; the policy hears of every change.

    A leaf that has no twin yet is announced once it has one.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        super().__init__()
        self._policy = policy

    def add(self, node: Any) -> None:
        super().add(node)
        if getattr(node, "twin", None) is not None:
            self._policy.candidate(node.twin)

    def remove(self, node: Any) -> None:
        super().remove(node)
        self._policy.retract(node.twin)


def _unheard(event: CacheEvent) -> None:
    """The engine sends KV events of its own; that somebody listens makes policies report each removal."""


class EngineTree(RadixTree):
    """The structural changes that policies make by themselves are made in the engine."""

    cut: Callable[[Any, int], EngineNode]
    drop: Callable[[Any], None]

    def split(self, node: Node, blocks: int) -> Node:
        if not 0 < blocks < node.size:
            raise ValueError(f"cannot split {node.size} blocks after {blocks}")
        return self.cut(node, blocks)

    def unlink(self, node: Node) -> None:
        self.drop(node)

    def grow(self, parent: Node, key: bytes, salt: bytes, engine: Any) -> EngineNode:
        """The engine made a leaf."""
        first = key[: self.stride]
        if parent.parent is None:
            first = salt + first
        node = EngineNode(key, len(key) // self.stride, first, parent, engine)
        parent.children[first] = node
        self.total += node.size
        return node

    def part(self, node: Node, blocks: int, engine: Any) -> EngineNode:
        """The engine put its node `engine` in front of `node`, with the first `blocks` blocks of it."""
        parent, at = node.parent, blocks * self.stride
        assert parent is not None
        upper = EngineNode(node.key[:at], blocks, node.first, parent, engine)
        parent.children[node.first] = upper
        node.key = node.key[at:]
        node.size -= blocks
        node.first = node.key[: self.stride]
        node.parent = upper
        upper.children[node.first] = node
        self.observer.split(upper, node)
        return upper


class PolicyHost(PrefixCache):
    """What a policy calls `cache`, in an engine that holds the tree. `unit`: bytes a token in a key.

    shrink(node, keep): the engine frees all but the first `keep` blocks of a leaf. drop(node): it unlinks a
    leaf without blocks. cut(node, blocks): it splits a node and calls `tree.part`.
    """

    tree: EngineTree
    tree_class = EngineTree

    def __init__(
        self,
        capacity: int,
        eviction: EvictionPolicy,
        *,
        block_size: int,
        unit: int,
        shrink: Callable[[Any, int], None],
        drop: Callable[[Any], None],
        cut: Callable[[Any, int], EngineNode],
    ) -> None:
        capacity = max(capacity, block_size)
        super().__init__(capacity, eviction, block_size=block_size, unit=unit, on_event=_unheard)
        self.tree.drop, self.tree.cut = drop, cut
        self.removed = shrink  # type: ignore[assignment, method-assign]  # hot: once a leaf that is cut

    def trim(self, node: Node, blocks: int) -> None:
        node.size -= blocks
        self.tree.total -= blocks
        self.removed(node, node.size)
        if node.size:
            self.tree.shrink_key(node)
        else:
            self.tree.unlink(node)
