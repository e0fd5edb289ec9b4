"""One worker's prefix cache: a radix tree, a capacity, an eviction policy, and exact accounts.

Every block is in exactly one of three places: in the tree (`cached`), held by a running request outside the
tree (`reserved`), or free. A running request locks the prefix it uses; only unlocked leaves can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvist.cache.base import EvictionPolicy
from kvist.cache.events import CacheEvent, Cleared, Removed, Stored
from kvist.model import TOKEN_BYTES, Query
from kvist.prefix.hashing import block_keys
from kvist.prefix.tree import Node, RadixTree


class Match(NamedTuple):
    """The longest cached prefix: its last node (the root for none) and its length in tokens."""

    node: Node
    length: int


class Inserted(NamedTuple):
    """The last node of the inserted prompt and how many of its blocks were new."""

    node: Node
    new_blocks: int


class PrefixCache:
    """A prefix cache of `capacity` tokens (rounded down to whole blocks).

    block_size: tokens a block (1 as SGLang's default, 16 as vLLM's). unit: bytes a token in a packed prompt.
    on_event: called with Stored / Removed / Cleared; None saves the hashing.
    Raises ValueError for a capacity below one block.
    """

    tree_class: type[RadixTree] = RadixTree  # an engine's plugin puts its own tree under the policy

    def __init__(
        self,
        capacity: int,
        eviction: EvictionPolicy,
        *,
        block_size: int = 1,
        unit: int = TOKEN_BYTES,
        on_event: Callable[[CacheEvent], None] | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, not {block_size}")
        if capacity < block_size:
            raise ValueError(
                f"capacity must hold at least one block of {block_size} tokens, not {capacity}: "
                "raise the capacity or lower the block size"
            )
        self.block_size = block_size
        self.stride = block_size * unit
        self.capacity_blocks = capacity // block_size
        self.reserved_blocks = 0
        self.evicted_blocks = 0  # over the cache's life
        self.eviction = eviction
        self.on_event = on_event
        self.tree = self.tree_class(self.stride, eviction)
        eviction.attach(self)

    # Counters, in tokens.
    @property
    def capacity(self) -> int:
        return self.capacity_blocks * self.block_size

    @property
    def cached(self) -> int:
        return self.tree.total * self.block_size

    @property
    def locked(self) -> int:
        return self.tree.locked * self.block_size

    @property
    def evictable(self) -> int:
        return (self.tree.total - self.tree.locked) * self.block_size

    @property
    def reserved(self) -> int:
        return self.reserved_blocks * self.block_size

    @property
    def free(self) -> int:
        return self.free_blocks * self.block_size

    @property
    def free_blocks(self) -> int:
        return self.capacity_blocks - self.tree.total - self.reserved_blocks

    def peek(self, prompt: bytes, salt: bytes = b"") -> int:
        """Tokens of the longest cached prefix; changes nothing a policy could see."""
        return self.probe(prompt, salt)[0]

    def probe(self, prompt: bytes, salt: bytes = b"") -> tuple[int, int]:
        """Tokens of the longest cached prefix, and how many of its blocks no request locks yet."""
        walk = self.tree.walk(prompt, salt)
        blocks, unlocked = walk.part, 0
        if walk.partial is not None and not walk.partial.locks:
            unlocked = walk.part
        for node in walk.path:
            blocks += node.size
            if not node.locks:
                unlocked += node.size
        return blocks * self.block_size, unlocked

    def match(self, prompt: bytes, now: float, salt: bytes = b"", query: Query | None = None) -> Match:
        """Find the longest cached prefix for a request that is about to be served, and tell the policy."""
        policy = self.eviction
        policy.begin(query, now)
        walk = self.tree.walk(prompt, salt)
        path = walk.path
        blocks = walk.offset // self.stride
        if walk.part:
            assert walk.partial is not None
            path.append(self.tree.split(walk.partial, walk.part))
            blocks += walk.part
        for node in path:
            policy.hit(node, now)
        return Match(path[-1] if path else self.tree.root, blocks * self.block_size)

    def lock(self, node: Node) -> None:
        """Keep the path to `node` from eviction while a request runs on it."""
        self.tree.lock(node)

    def unlock(self, node: Node) -> None:
        self.tree.unlock(node)

    def reserve(self, blocks: int) -> bool:
        """Take `blocks` free blocks for a running request, evicting as needed.

        False, with nothing taken and nothing evicted, if even evicting all that is unlocked would not do.
        """
        lacking = blocks - self.free_blocks
        if lacking > 0:
            if lacking > self.tree.total - self.tree.locked:
                return False
            self.evict(lacking)
        self.reserved_blocks += blocks
        return True

    def release(self, blocks: int) -> None:
        """Give reserved blocks back. Raises ValueError if fewer are reserved."""
        if not 0 <= blocks <= self.reserved_blocks:
            raise ValueError(f"cannot release {blocks} of {self.reserved_blocks} reserved blocks")
        self.reserved_blocks -= blocks

    def insert(self, prompt: bytes, now: float, salt: bytes = b"", *, below: Match | None = None) -> Inserted:
        """Put the prompt's whole blocks into the tree; new ones come out of the caller's reservation.

        `below` is a locked match of the same prompt, to start from. Raises ValueError if fewer blocks are
        reserved than are new.
        """
        tree, policy = self.tree, self.eviction
        if below is None:
            walk = tree.walk(prompt, salt)
        else:
            walk = tree.walk(prompt, salt, below.node, below.length // self.block_size * self.stride)
        node = walk.path[-1] if walk.path else (below.node if below else tree.root)
        if walk.part:
            assert walk.partial is not None
            node = tree.split(walk.partial, walk.part)
            walk.path.append(node)
        for seen in walk.path:
            policy.touch(seen, now)
        offset = walk.offset + walk.part * self.stride
        end = len(prompt) - len(prompt) % self.stride
        new = (end - offset) // self.stride
        if new <= 0:
            return Inserted(node, 0)
        self.release(new)
        parent = node
        node = tree.append(parent, prompt, offset, end, salt)
        if self.on_event is not None:
            self._stored(node, parent, salt)
        policy.insert(node, now)
        tree.offer(node)
        return Inserted(node, new)

    def serve(self, prompt: bytes, now: float, salt: bytes = b"", query: Query | None = None) -> int:
        """Serve a request at once: hit tokens, with the prompt cached afterwards (as much as fits)."""
        match = self.match(prompt, now, salt, query)
        self.lock(match.node)
        hit_blocks = match.length // self.block_size
        want = len(prompt) // self.stride - hit_blocks
        room = self.free_blocks + self.tree.total - self.tree.locked
        fit = min(want, max(room, 0))
        if fit and self.reserve(fit):
            if fit < want:
                prompt = prompt[: (hit_blocks + fit) * self.stride]
            self.insert(prompt, now, salt, below=match)
        self.unlock(match.node)
        return match.length

    def evict(self, blocks: int) -> int:
        """Evict up to `blocks` blocks by the policy; the number freed."""
        freed = self.eviction.evict(blocks)
        self.evicted_blocks += freed
        return freed

    def trim(self, node: Node, blocks: int) -> None:
        """For policies: evict the last `blocks` blocks of a candidate."""
        if self.on_event is not None:
            self.removed(node, node.size - blocks)
        self.tree.trim(node, blocks)

    def removed(self, node: Node, keep: int) -> None:
        """For policies: announce that only the first `keep` blocks of `node` stay."""
        assert node.hashes is not None and self.on_event is not None
        gone = node.hashes[keep:]
        if gone:
            del node.hashes[keep:]
            self.on_event(Removed(tuple(gone)))

    def reset(self) -> None:
        """Drop all that is cached. Raises ValueError while a request holds a lock or a reservation."""
        if self.tree.locked or self.reserved_blocks:
            raise ValueError("cannot reset the cache while requests run on it")
        self.tree.clear()
        self.eviction.reset()
        if self.on_event is not None:
            self.on_event(Cleared())

    def _stored(self, node: Node, parent: Node, salt: bytes) -> None:
        assert self.on_event is not None
        above = parent.hashes[-1] if parent.hashes else None
        node.hashes = block_keys(node.key, self.stride, salt, above)
        self.on_event(Stored(tuple(node.hashes), above, node.key, self.block_size, salt))
