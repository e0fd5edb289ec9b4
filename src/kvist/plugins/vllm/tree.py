"""vLLM's cached blocks as the core's policies see them: a tree with one node a block.

A block's parent is the block before it in the request that cached it. A node is locked while any physical
copy of its block is in use (vLLM computes a block again when a request needs its last token, or when two
requests compute the same prefix at once), and at most one copy is free: the pool drops the others.

Every operation costs O(1) a block. The tree knows nothing of vLLM; `block` is what the host hands in.
"""

from __future__ import annotations

from typing import Any

from kvist.cache import EvictionPolicy, PrefixCache
from kvist.cache.events import CacheEvent
from kvist.prefix.tree import Node


class BlockNode(Node):
    """One cached block. `block`: its free copy, None while it has none. `locks`: copies in use."""

    __slots__ = ("block",)

    def __init__(self, name: bytes, parent: Node) -> None:
        super().__init__(b"", 1, name, parent)
        self.block: Any = None


def _unheard(event: CacheEvent) -> None:
    """The engine sends KV events of its own; that somebody listens makes policies report each removal."""


class BlockTree(PrefixCache):
    """`blocks` blocks of `block_size` tokens under a policy. `now` counts the calls that use blocks."""

    def __init__(self, blocks: int, eviction: EvictionPolicy, block_size: int) -> None:
        super().__init__(blocks * block_size, eviction, block_size=block_size, unit=1, on_event=_unheard)
        self.now = 0
        self._victims: list[Any] = []

    def begin(self) -> None:
        """A request is about to be served: its hits, then its allocations follow."""
        self.now += 1
        self.eviction.begin(None, self.now)

    def child(self, parent: BlockNode | None, name: bytes) -> BlockNode | None:
        """The cached block `name` behind `parent` (None: at the root)."""
        found = (parent or self.tree.root).children.get(name)
        assert found is None or isinstance(found, BlockNode)
        return found

    def grow(self, parent: BlockNode | None, name: bytes) -> BlockNode:
        """A block was computed behind `parent`: a new node, with one copy in use."""
        tree, above = self.tree, parent or self.tree.root
        if not above.children and not above.locks:
            self.eviction.retract(above)
        node = BlockNode(name, above)
        node.locks = 1
        above.children[name] = node
        tree.total += 1
        tree.locked += 1
        self.eviction.insert(node, self.now)
        return node

    def use(self, node: BlockNode) -> None:
        """A copy of the block came into use: the free one, or a new one beside it."""
        if not node.locks:
            if not node.children:
                self.eviction.retract(node)
            self.tree.locked += 1
            node.block = None
        node.locks += 1

    def rest(self, node: BlockNode, block: Any) -> bool:
        """`block`, a copy in use, became free. False: another copy is in use, this one is worth nothing."""
        node.locks -= 1
        if node.locks:
            return False
        self.tree.locked -= 1
        node.block = block
        if not node.children:
            self.eviction.candidate(node)
        return True

    def victims(self, blocks: int) -> list[Any]:
        """Evict up to `blocks` blocks by the policy; the copies that are free now, in order of eviction."""
        self.evict(blocks)
        found, self._victims = self._victims, []
        return found

    def lose(self, node: BlockNode, block: Any) -> None:
        """`block` stopped being a copy of its node's block, whatever the policy thinks of it.

        Blocks behind it stay, at the root: they can be hit again once their parent is computed again.
        """
        in_use = node.block is not block
        if in_use and node.locks > 1:
            node.locks -= 1
            return
        tree, policy, parent = self.tree, self.eviction, node.parent
        assert parent is not None
        if node.locks:
            tree.locked -= 1
        elif not node.children:
            policy.retract(node)
        for child in node.children.values():
            child.first = b"orphan %d" % id(child)
            child.parent = tree.root
            tree.root.children[child.first] = child
        node.children = {}
        node.block = node.parent = None
        del parent.children[node.first]
        tree.total -= 1
        policy.remove(node)
        if not parent.children and not parent.locks:
            policy.candidate(parent)

    def removed(self, node: Node, keep: int) -> None:
        if not keep and isinstance(node, BlockNode) and node.block is not None:
            self._victims.append(node.block)
            node.block = None
