"""vLLM's cached blocks in the core's own prefix cache, with what vLLM needs to find them again.

A block's name in the tree is the front of its chained hash, so a request's blocks are a path, and nodes hold
runs of blocks as they do for tokens; splits, hits and evictions are the core's. Where a node of the core
keeps block hashes, it keeps `Cached` entries here.

vLLM counts references a block, the core locks paths. Both agree as long as all blocks of a node are in use or
all are free, so a node is split where that would change within it. vLLM may hold a block in several physical
copies (two requests compute one prefix at once, or a prompt's last block anew); all but one free copy are
worth nothing, and the pool is told to drop them. Cost is O(1) a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvist.cache import EvictionPolicy, Match, PrefixCache
from kvist.cache.events import CacheEvent
from kvist.prefix.tree import Node

NAME = 16  # bytes of a block's hash that name it, at least


class Cached:
    """A cached block: its node (None once it is gone), copies in use, and its free copy if there is none."""

    __slots__ = ("block", "copies", "node")

    def __init__(self, node: Node) -> None:
        self.node: Node | None = node
        self.copies = 0
        self.block: Any = None


class _Watch:
    """The tree's observer: keeps `Cached.node` right, and passes everything on to the policy."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.candidate, self.retract = policy.candidate, policy.retract
        self.remove, self.settle = policy.remove, policy.settle
        self._split = policy.split

    def split(self, upper: Node, lower: Node) -> None:
        for cached in entries(upper):
            cached.node = upper
        self._split(upper, lower)


def entries(node: Node) -> list[Cached]:
    """What a node holds, root side first."""
    return node.hashes or []  # type: ignore[return-value]


def _unheard(event: CacheEvent) -> None:
    """The engine has KV events of its own; that somebody listens makes the core keep entries."""


class BlockTree(PrefixCache):
    """`blocks` blocks of `block_size` tokens under a policy. `now` counts the calls that use blocks.

    A name stands where the core has a block's tokens, so it has as many bytes: `unit` for each token.
    """

    def __init__(self, blocks: int, block_size: int, eviction: EvictionPolicy) -> None:
        unit = -(-NAME // block_size)
        super().__init__(blocks * block_size, eviction, block_size=block_size, unit=unit, on_event=_unheard)
        self.tree.observer = _Watch(eviction)
        self.now = 0
        self._gone: list[Cached] = []

    def path(self, hashes: Iterable[bytes]) -> bytes:
        """The names of blocks with these hashes, one behind the other."""
        width = self.stride
        return b"".join([name[:width].ljust(width, b"\0") for name in hashes])

    def start(self, path: bytes) -> None:
        """A request starts, and hits the blocks of `path` (see `path`)."""
        self.now += 1
        self.match(path, self.now)

    def store(self, parent: Cached | None, path: bytes) -> tuple[list[Cached], list[Any]]:
        """Blocks were computed behind `parent` (None: at the root) and are in use now.

        Their entries, and the free copies of those that were cached already, which are worth nothing now.
        """
        self.now += 1
        below = self.tree.root if parent is None else self._ending_with(parent)
        inserted = self.insert(path, self.now, below=Match(below, 0))
        chain, node = [], inserted.node
        while node is not below:
            chain.append(node)
            assert node.parent is not None
            node = node.parent
        found: list[Cached] = []
        spare = []
        for node in chain:
            if not node.locks:
                spare += [cached.block for cached in entries(node) if cached.block is not None]
                self._lock(node)
        for node in reversed(chain):
            found += entries(node)
        for cached in found:
            cached.copies += 1
            cached.block = None
        return found, spare

    def use(self, taken: Sequence[Cached]) -> None:
        """Free blocks came into use, root side first."""
        for cached in taken:
            cached.copies = 1
            cached.block = None
        for node in self._nodes(taken, first=0, last=-1):
            self._lock(node)

    def touch(self, path: Iterable[Cached]) -> None:
        """A request that used these blocks ends now, leaf side first; `rest` is told next."""
        self.now += 1
        nodes = dict.fromkeys(cached.node for cached in path)
        touch, now = self.eviction.touch, self.now
        for node in reversed(nodes):
            if node is not None:
                touch(node, now)

    def rest(self, freed: Iterable[tuple[Cached, Any]]) -> list[Any]:
        """Physical copies that nobody uses any more, leaf side first; of them those worth nothing."""
        spare, idle = [], []
        for cached, block in freed:
            cached.copies -= 1
            if cached.copies:
                spare.append(block)
            else:
                cached.block = block
                idle.append(cached)
        for node in self._nodes(idle, first=-1, last=0):
            node.locks = 0
            self.tree.locked -= node.size
            self.tree.offer(node)
        return spare

    def victims(self, blocks: int) -> list[Any]:
        """Evict up to `blocks` blocks by the policy; the copies that are free now."""
        self.evict(blocks)
        found = [cached.block for cached in self._gone]
        self._gone.clear()
        return found

    def lose(self, cached: Cached, block: Any) -> list[Any]:
        """`block` holds nothing any more, whatever the policy thinks of it.

        With its last copy goes all that was cached behind it: the free copies among that.
        """
        if cached.copies > 1:
            cached.copies -= 1
            return []
        node = self._starting_with(cached)
        parent, order, stack = node.parent, [], [node]
        assert parent is not None
        while stack:
            at = stack.pop()
            order.append((at, not at.children and not at.locks))
            stack.extend(at.children.values())
        for at, candidate in reversed(order):
            self._drop(at, candidate)
        gone, self._gone = self._gone, []
        if parent.parent is not None:
            self.tree.offer(parent)
        return [other.block for other in gone if other.block is not None and other is not cached]

    # What the core asks of a cache.

    def release(self, blocks: int) -> None:
        """Blocks outside the tree are vLLM's business."""

    def removed(self, node: Node, keep: int) -> None:
        held = entries(node)
        for cached in reversed(held[keep:]):
            cached.node = None
            self._gone.append(cached)
        del held[keep:]

    def _stored(self, node: Node, parent: Node, salt: bytes) -> None:
        node.hashes = [Cached(node) for _ in range(node.size)]  # type: ignore[misc]

    # Nodes whose blocks are all in use, or all free.

    def _lock(self, node: Node) -> None:
        if not node.children:
            self.eviction.retract(node)
        node.locks = 1
        self.tree.locked += node.size

    def _nodes(self, run: Sequence[Cached], *, first: int, last: int) -> Iterable[Node]:
        """Nodes that hold exactly these blocks. `first`: the end of a node that the run comes upon first."""
        i = 0
        while i < len(run):
            node = run[i].node
            assert node is not None
            held = entries(node)
            end = i + len(held)
            if end > len(run) or held[first] is not run[i] or held[last] is not run[end - 1]:
                self._ending_with(run[i])
                node, end = self._starting_with(run[i]), i + 1
            yield node
            i = end

    def _ending_with(self, cached: Cached) -> Node:
        """The node that ends with this block, split off if need be."""
        node = self._settled(cached)
        blocks = 1 if node.size == 1 else entries(node).index(cached) + 1
        return node if blocks == node.size else self.tree.split(node, blocks)

    def _starting_with(self, cached: Cached) -> Node:
        node = self._settled(cached)
        blocks = entries(node).index(cached)
        if blocks:
            self.tree.split(node, blocks)  # `node` keeps the rest
        return node

    def _settled(self, cached: Cached) -> Node:
        node = cached.node
        assert node is not None
        if node.slot >= 0:
            self.eviction.settle(node)
        return node

    def _drop(self, node: Node, candidate: bool) -> None:
        """Take a node out whose children are gone."""
        tree, policy, parent = self.tree, self.eviction, node.parent
        assert parent is not None
        if candidate:
            policy.retract(node)
        if node.locks:
            tree.locked -= node.size
        del parent.children[node.first]
        node.parent = None
        tree.total -= node.size
        policy.remove(node)
        self.removed(node, 0)
