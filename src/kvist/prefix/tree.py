"""The radix tree over blocks of tokens: match, insert, split, lock, remove the tail of a leaf.

A prompt is packed bytes; `stride` bytes are one block (block_size tokens of `unit` bytes). An edge holds
whole blocks, so two prefixes compare with one memcmp and the first difference is found by numpy. Every
operation costs O(length touched) and none walks the whole tree. Sizes are in blocks and kept, not recounted.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

_SHORT = 64  # below this many bytes a Python loop beats two numpy calls


class Node:
    """An edge and its end. `size` blocks are valid; `key` may be longer after a tail was evicted.

    Fields from `last` on belong to the eviction policy. slot >= 0 says that the policy keeps the node's size
    itself (see `Observer.settle`).
    """

    __slots__ = (
        "born",
        "children",
        "first",
        "hashes",
        "hits",
        "key",
        "last",
        "locks",
        "mark",
        "parent",
        "size",
        "slot",
        "state",
        "ticket",
    )

    def __init__(self, key: bytes, size: int, first: bytes, parent: Node | None) -> None:
        self.key = key
        self.size = size
        self.first = first  # this node's key in parent.children
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.hashes: list[int] | None = None  # chained block hashes, where the cache emits events
        self.last = 0.0
        self.born = 0.0
        self.hits = 0
        self.mark = -1
        self.slot = -1
        self.ticket = -1
        self.state: Any = None


class Observer(Protocol):
    """Who hears of structural changes (the eviction policy)."""

    def split(self, upper: Node, lower: Node) -> None: ...
    def candidate(self, node: Node) -> None: ...
    def retract(self, node: Node) -> None: ...
    def remove(self, node: Node) -> None: ...
    def settle(self, node: Node) -> None: ...


class Walk:
    """Where a prompt leaves the tree: `path` fully matched nodes, then `part` blocks into `partial`."""

    __slots__ = ("offset", "part", "partial", "path")

    def __init__(self, path: list[Node], partial: Node | None, part: int, offset: int) -> None:
        self.path = path
        self.partial = partial
        self.part = part
        self.offset = offset  # bytes of the prompt covered by `path`


def common_prefix(a: bytes, start: int, b: bytes, limit: int) -> int:
    """Bytes in which a[start:] and b agree, looking at no more than `limit` bytes of each."""
    if limit < _SHORT:
        for i in range(limit):
            if a[start + i] != b[i]:
                return i
        return limit
    differs = np.frombuffer(a, np.uint8, limit, start) != np.frombuffer(b, np.uint8, limit)
    first = int(differs.argmax())
    return first if differs[first] else limit


class RadixTree:
    """A prefix-closed set of block sequences. Salts keep prefixes of different tenants apart."""

    def __init__(self, stride: int, observer: Observer) -> None:
        if stride < 1:
            raise ValueError(f"stride must be at least 1 byte, not {stride}")
        self.stride = stride
        self.observer = observer
        self.clear()

    def clear(self) -> None:
        self.root = Node(b"", 0, b"", None)
        self.root.locks = 1  # never a candidate
        self.total = 0
        self.locked = 0

    def walk(self, prompt: bytes, salt: bytes = b"", start: Node | None = None, offset: int = 0) -> Walk:
        """Follow the prompt from `start` (default the root), whose path covers its first `offset` bytes."""
        stride = self.stride
        node = start if start is not None else self.root
        end = len(prompt) - len(prompt) % stride
        path: list[Node] = []
        while offset < end:
            first = prompt[offset : offset + stride]
            child = node.children.get(salt + first if node.parent is None else first)
            if child is None:
                break
            if child.slot >= 0:
                self.observer.settle(child)
            span = child.size * stride
            key = child.key
            if len(key) != span:
                key = child.key = key[:span]
            if not prompt.startswith(key, offset):
                part = common_prefix(prompt, offset, key, min(span, end - offset)) // stride
                return Walk(path, child, part, offset)
            path.append(child)
            node = child
            offset += span
        return Walk(path, None, 0, offset)

    def split(self, node: Node, blocks: int) -> Node:
        """Cut the first `blocks` blocks of `node` into a new parent and return it; `node` keeps the rest."""
        if not 0 < blocks < node.size:
            raise ValueError(f"cannot split {node.size} blocks after {blocks}")
        parent = node.parent
        assert parent is not None
        at = blocks * self.stride
        upper = Node(node.key[:at], blocks, node.first, parent)
        upper.locks = node.locks
        if node.hashes is not None:
            upper.hashes, node.hashes = node.hashes[:blocks], node.hashes[blocks:]
        parent.children[node.first] = upper
        node.key = node.key[at:]
        node.size -= blocks
        node.first = node.key[: self.stride]
        node.parent = upper
        upper.children[node.first] = node
        self.observer.split(upper, node)
        return upper

    def append(self, parent: Node, prompt: bytes, offset: int, end: int, salt: bytes = b"") -> Node:
        """Add prompt[offset:end] (whole blocks, not empty) as a new unlocked leaf below `parent`.

        The caller announces it: the new node becomes a candidate with `offer`.
        """
        key = prompt[offset:end]
        first = key[: self.stride]
        if parent.parent is None:
            first = salt + first
        node = Node(key, len(key) // self.stride, first, parent)
        if not parent.children and not parent.locks:
            self.observer.retract(parent)
        parent.children[first] = node
        self.total += node.size
        return node

    def offer(self, node: Node) -> None:
        """Tell the observer that `node` is a candidate, if it is an unlocked leaf."""
        if not node.locks and not node.children:
            self.observer.candidate(node)

    def lock(self, node: Node) -> None:
        """Protect the path from `node` to the root; locks nest."""
        at: Node = node
        while at.parent is not None:
            if not at.locks:
                if not at.children:
                    self.observer.retract(at)
                self.locked += at.size
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock` of the same node. Raises ValueError if it is not locked."""
        at: Node = node
        while at.parent is not None:
            if at.locks < 1:
                raise ValueError("unlock without a matching lock")
            at.locks -= 1
            if not at.locks:
                self.locked -= at.size
                if not at.children:
                    self.observer.candidate(at)
            at = at.parent

    def trim(self, node: Node, blocks: int) -> None:
        """Remove the last `blocks` blocks of a candidate; the node goes when none is left."""
        node.size -= blocks
        self.total -= blocks
        if node.size:
            self.shrink_key(node)
        else:
            self.unlink(node)

    def shrink_key(self, node: Node) -> None:
        """Free the memory of evicted blocks once they are the larger part: amortised over the evictions."""
        span = node.size * self.stride
        if len(node.key) >= 2 * span:
            node.key = node.key[:span]

    def unlink(self, node: Node) -> None:
        """Take out a candidate whose blocks are all gone; its parent may become a candidate."""
        parent = node.parent
        assert parent is not None and not node.children and not node.locks
        self.observer.retract(node)
        del parent.children[node.first]
        node.parent = None
        self.observer.remove(node)
        if not parent.children and not parent.locks:
            self.observer.candidate(parent)
