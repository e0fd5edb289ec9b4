"""The prefix cache against the set-of-prefixes oracle, for every policy, over random operation sequences."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PrefixSet

from kvist.cache import EVICTIONS, PrefixCache, make_eviction
from kvist.cache.events import CacheEvent, Cleared, Removed, Stored
from kvist.model import pack
from kvist.prefix.hashing import block_keys
from kvist.prefix.tree import Node

ONLINE = sorted(set(EVICTIONS) - {"belady"})
Blocks = tuple[int, ...]


def prompt_of(blocks: Blocks, block_size: int, tail: int = 0) -> bytes:
    """Each block is `block_size` tokens named by its number; `tail` tokens more do not fill a block."""
    tokens = np.repeat(np.array(blocks, dtype=np.uint32), block_size) * 64
    tokens += np.tile(np.arange(block_size, dtype=np.uint32), len(blocks))
    return pack(tokens) + pack([7] * tail)


def cached_prefixes(cache: PrefixCache) -> set[Blocks]:
    """Read the tree back, node by node."""
    found: set[Blocks] = set()

    def visit(node: Node, above: Blocks) -> None:
        if node.slot >= 0:
            cache.eviction.settle(node)
        tokens = np.frombuffer(node.key[: node.size * cache.stride], "<u4")
        blocks = tuple(int(t) // 64 for t in tokens[:: cache.block_size])
        assert len(blocks) == node.size and (node.size > 0 or node is cache.tree.root)
        for i in range(1, len(blocks) + 1):
            found.add(above + blocks[:i])
        for child in node.children.values():
            assert child.parent is node
            visit(child, above + blocks)

    visit(cache.tree.root, ())
    return found


operations = st.lists(
    st.tuples(
        st.sampled_from(["serve", "serve", "serve", "start", "start", "finish", "evict", "peek"]),
        st.lists(st.integers(0, 2), min_size=0, max_size=7).map(tuple),
        st.integers(0, 3),
    ),
    max_size=40,
)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=200, deadline=None)
@given(ops=operations, capacity=st.integers(1, 12), seed=st.integers(0, 9))
def test_agrees_with_the_oracle(
    name: str, block_size: int, ops: list[tuple[str, Blocks, int]], capacity: int, seed: int
) -> None:
    cache = PrefixCache(capacity * block_size, make_eviction(name, rng=Random(seed)), block_size=block_size)
    oracle = PrefixSet()
    running: list[tuple[Node, Blocks]] = []
    for now, (op, blocks, number) in enumerate(ops):
        prompt = prompt_of(blocks, block_size, tail=number % block_size)
        expected = oracle.match(blocks)
        before = set(oracle.prefixes)
        allowed = oracle.leaves()
        if op == "peek":
            assert cache.peek(prompt) == expected * block_size
        elif op == "serve":
            assert cache.serve(prompt, now) == expected * block_size
            oracle.lock(blocks[:expected])
            kept = expected + min(len(blocks) - expected, capacity - oracle.locked())
            oracle.unlock(blocks[:expected])
            after = cached_prefixes(cache)
            assert all(blocks[:i] in after for i in range(1, kept + 1)), "a served prompt is cached"
            assert after - before == {blocks[:i] for i in range(expected + 1, kept + 1)}
        elif op == "start":
            match = cache.match(prompt, now)
            assert match.length == expected * block_size
            cache.lock(match.node)
            oracle.lock(blocks[:expected])
            running.append((match.node, blocks[:expected]))
        elif op == "finish" and running:
            node, path = running.pop(number % len(running))
            cache.unlock(node)
            oracle.unlock(path)
        elif op == "evict":
            evictable = cache.evictable // block_size
            assert cache.evict(number) == min(number, evictable)
        after = cached_prefixes(cache)
        gone = before - after
        for prefix in gone:
            assert oracle.locks[prefix] <= 0, "a locked block was evicted"
        assert all(p[:-1] in after for p in after if len(p) > 1), "prefix-closed"
        assert gone <= before and (not gone or gone & allowed)
        oracle.prefixes = after
        assert cache.cached == len(after) * block_size <= cache.capacity
        assert cache.locked == oracle.locked() * block_size
        assert cache.evictable == cache.cached - cache.locked
        assert cache.reserved == 0 and cache.free == cache.capacity - cache.cached
    for node, _ in running:
        cache.unlock(node)
    cache.evict(capacity)
    assert cache.cached == 0 and cache.locked == 0


@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=60, deadline=None)
@given(
    ops=operations, seed=st.integers(0, 9), salts=st.lists(st.sampled_from([b"", b"a", b"ab"]), min_size=40)
)
def test_events_tell_the_whole_state(
    name: str, ops: list[tuple[str, Blocks, int]], seed: int, salts: list[bytes]
) -> None:
    """Whoever applies Stored and Removed knows exactly the cached block hashes, salts apart."""
    known: set[int] = set()

    def apply(event: CacheEvent) -> None:
        if isinstance(event, Stored):
            assert event.parent is None or event.parent in known
            assert len(event.tokens) == len(event.hashes) * 2 * 4
            assert not known & set(event.hashes)
            known.update(event.hashes)
        elif isinstance(event, Removed):
            assert known.issuperset(event.hashes)
            known.difference_update(event.hashes)
        else:
            assert isinstance(event, Cleared)
            known.clear()

    cache = PrefixCache(16, make_eviction(name, rng=Random(seed)), block_size=2, on_event=apply)
    for now, ((_, blocks, _number), salt) in enumerate(zip(ops, salts, strict=False)):
        prompt = prompt_of(blocks, 2)
        hit = cache.serve(prompt, now, salt)
        keys = block_keys(prompt, 8, salt)
        assert known.issuperset(keys[: min(len(keys), 8)])
        assert hit <= len(prompt) // 4
        assert len(known) == cache.cached // 2
        for other in (b"", b"a", b"ab"):
            seen = cache.peek(prompt, other) // 2
            chain = block_keys(prompt, 8, other)
            assert known.issuperset(chain[:seen])
            assert seen == len(chain) or chain[seen] not in known
    cache.reset()
    assert not known and cache.cached == 0


def test_marked_tokens_are_counted_and_safe() -> None:
    """RLT's marked counter equals a recount, and no marked token leaves while an unmarked leaf is there."""
    rng = Random(5)
    cache = PrefixCache(64, policy := EVICTIONS["rlt"](rng=Random(1)), block_size=1)
    for now in range(3000):
        blocks = tuple(rng.randrange(3) for _ in range(rng.randrange(1, 8)))
        phase = policy.phase  # type: ignore[attr-defined]
        marked_before = {p for p, marked in _marks(cache).items() if marked}
        cache.serve(prompt_of(blocks, 1), now)
        after = _marks(cache)
        if policy.phase == phase:  # type: ignore[attr-defined]
            assert marked_before <= {p for p, marked in after.items() if marked}
        assert policy.marked == sum(after.values())  # type: ignore[attr-defined]
        assert all(after[blocks[:i]] for i in range(1, len(blocks) + 1)), "a served token is marked"
    assert policy.phase > 3  # type: ignore[attr-defined]


def _marks(cache: PrefixCache) -> dict[Blocks, bool]:
    found: dict[Blocks, bool] = {}

    def visit(node: Node, above: Blocks) -> None:
        if node.slot >= 0:
            cache.eviction.settle(node)
        tokens = np.frombuffer(node.key[: node.size * 4], "<u4") // 64
        path = above
        for token in tokens:
            path = (*path, int(token))
            found[path] = node.mark == cache.eviction.phase  # type: ignore[attr-defined]
        for child in node.children.values():
            visit(child, path)

    visit(cache.tree.root, ())
    return found
