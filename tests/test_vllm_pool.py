"""vLLM's real KVCacheManager with the plugin, beside the core's PrefixCache with the same policy and seed.

Over random sequences of requests (prefix hits, chunked prefill, decoding, shared and recomputed blocks,
preemption, resets) the two must give the same hits and evict the same blocks, and vLLM's invariants must
hold after every step.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache import EVICTIONS, PrefixCache, make_eviction
from kvist.cache.cache import Match
from kvist.model import pack
from kvist.plugins import Unsupported
from kvist.plugins.vllm import install
from kvist.plugins.vllm.tree import entries
from kvist.prefix.tree import Node

pytest.importorskip("vllm", reason="vLLM is not installed: make test-engines runs this")

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm_manager import BLOCK, make_manager, make_request, plugin_on

ONLINE = sorted(set(EVICTIONS) - {"belady"})
Prefix = tuple[int, ...]  # token ids of whole blocks


class Copy:
    """A physical block, as far as the oracle needs it."""

    def __init__(self) -> None:
        self.refs = 0


class Run:
    """A request under way, on both sides."""

    def __init__(self, request: Any, tokens: list[int]) -> None:
        self.request = request
        self.tokens = tokens
        self.computed = 0
        self.copies: list[Copy] = []
        self.cached = 0  # blocks that carry a hash
        self.at: Match | None = None


class Pair:
    """The engine's manager and the core's cache, driven together. Each step compares them."""

    def __init__(self, blocks: int, policy: str, seed: int) -> None:
        self.manager = make_manager(blocks, policy, seed, events=True)
        self.pool = self.manager.block_pool
        self.core = PrefixCache(blocks * BLOCK, make_eviction(policy, rng=Random(seed)), block_size=BLOCK)
        self.blocks = blocks
        self.now = 0
        self.running: list[Run] = []
        self.copies: dict[Prefix, list[Copy]] = {}
        self.heard: dict[Any, Prefix] = {}  # hash -> tokens, from the KV events
        self.hits = 0

    # The oracle's physical blocks.
    def in_use(self) -> int:
        return len({id(copy) for run in self.running for copy in run.copies})

    def settle(self) -> None:
        """What is in use and not in the core's tree is reserved there."""
        self.core.release(self.core.reserved_blocks - (self.in_use() - self.core.tree.locked))

    def start(self, tokens: list[int], chunk: int) -> None:
        request = make_request(tokens)
        computed, hit, _ = self.manager.get_computed_blocks(request)
        prompt = pack(tokens)
        expected = min(self.core.peek(prompt), (len(tokens) - 1) // BLOCK * BLOCK)
        assert hit == expected, "the same hit on both sides"
        new = min(chunk, len(tokens) - hit)
        need = -(-(hit + new) // BLOCK) - hit // BLOCK
        unlocked = self.core.probe(prompt[: hit * 4])[1]
        fits = need <= self.core.free_blocks + self.core.evictable // BLOCK - unlocked
        slots = self.manager.allocate_slots(request, new, hit, computed)
        assert (slots is not None) == fits, "admitted on both sides or on neither"
        if slots is None:
            return
        self.hits += hit
        run = Run(request, list(tokens))
        self.now += 1
        match = self.core.match(prompt[: hit * 4], self.now)
        assert match.length == hit
        self.core.lock(match.node)
        run.at = match
        for i in range(hit // BLOCK):
            run.copies.append(self.copies[tuple(tokens[: (i + 1) * BLOCK])][0])
            run.copies[-1].refs += 1
        run.cached = hit // BLOCK
        run.computed = request.num_computed_tokens = hit
        self.running.append(run)
        self.compute(run, new, need)

    def compute(self, run: Run, new: int, need: int) -> None:
        """`new` tokens were given slots, `need` new blocks: do the same in the core."""
        assert self.core.reserve(need)
        for _ in range(need):
            run.copies.append(Copy())
            run.copies[-1].refs += 1
        run.computed += new
        run.request.num_computed_tokens = run.computed
        whole = run.computed // BLOCK
        if whole > run.cached:
            self.now += 1
            assert run.at is not None
            old = run.at
            node = self.core.insert(pack(run.tokens[: whole * BLOCK]), self.now, below=old).node
            self.core.lock(node)
            self.core.unlock(old.node)
            run.at = Match(node, whole * BLOCK)
            for i in range(run.cached, whole):
                mine = self.copies.setdefault(tuple(run.tokens[: (i + 1) * BLOCK]), [])
                mine[:] = [copy for copy in mine if copy.refs]
                mine.append(run.copies[i])
            run.cached = whole
        self.settle()

    def go_on(self, run: Run, more: int) -> bool:
        """The rest of the prompt, else `more` output tokens. False: there is no room."""
        left = len(run.tokens) - run.computed
        if not left:
            fresh = [1_000_000 + 3 * (at := len(run.tokens) + i) + at % 3 for i in range(more)]
            run.request.append_output_token_ids(fresh)
            run.tokens += fresh
            left = more
        need = -(-(run.computed + left) // BLOCK) - len(run.copies)
        fits = need <= self.core.free_blocks + self.core.evictable // BLOCK
        slots = self.manager.allocate_slots(run.request, left)
        assert (slots is not None) == fits
        if slots is not None:
            self.compute(run, left, need)
        return slots is not None

    def finish(self, run: Run) -> None:
        """The request ended, or was preempted: its blocks are free."""
        self.running.remove(run)
        self.manager.free(run.request)
        self.now += 1
        assert run.at is not None
        self.core.insert(pack(run.tokens[: run.cached * BLOCK]), self.now)
        for i, copy in enumerate(run.copies):
            copy.refs -= 1
            if i < run.cached and not copy.refs:
                mine = self.copies[tuple(run.tokens[: (i + 1) * BLOCK])]
                if len(mine) > 1:
                    mine.remove(copy)
        self.settle_unlock(run.at.node)

    def settle_unlock(self, node: Node) -> None:
        self.core.unlock(node)
        self.settle()

    def reset(self) -> None:
        ok = self.manager.reset_prefix_cache()
        assert ok == (not self.in_use())
        if ok:
            self.core.reset()
            self.copies.clear()

    def check(self) -> None:
        pool, core = self.pool, self.core
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == pool.get_num_free_blocks() == self.blocks - self.in_use()
        assert pool.get_num_free_blocks() == core.free_blocks + core.evictable // BLOCK
        assert pool.get_usage() == pytest.approx(self.in_use() / self.blocks)
        assert pool.null_block.is_null and pool.null_block.block_hash is None
        free_ids = {block.block_id for block in free}
        assert len(free_ids) == len(free) and 0 not in free_ids
        assert all((block.ref_cnt == 0) == (block.block_id in free_ids) for block in pool.blocks[1:])
        refs = Counter(
            block.block_id
            for run in self.running
            for block in self.manager.get_blocks(run.request.request_id).blocks[0]
        )
        assert all(block.ref_cnt == refs[block.block_id] for block in pool.blocks[1:])
        # Blocks without a hash in front of cached ones, and the tree's accounts.
        hashed = [block.block_hash is not None for block in free]
        assert hashed == sorted(hashed) and pool._blank == hashed.count(False)
        tree = pool.cached
        cached = [block for block in pool.blocks if block.block_hash is not None]
        names = {block.block_hash for block in cached}
        known = pool.cached_block_hash_to_block
        assert len(known) == len(names) == tree.tree.total == core.tree.total
        assert tree.tree.locked == core.tree.locked
        assert all(known.contain(block.block_hash, block.block_id) for block in cached)
        twins = Counter(block.block_hash for block in free if block.block_hash)
        assert all(count == 1 for count in twins.values()), "one free copy at most"
        assert all(pool._held[block.block_id].node is not None for block in cached)
        self.check_tree(tree.tree.root)
        assert tree.evicted_blocks == core.evicted_blocks
        self.listen(names)

    def check_tree(self, root: Node) -> None:
        """Entries stand in their nodes, by name, and a node's blocks are all in use or all free."""
        stack, width = list(root.children.values()), self.pool.cached.stride
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.slot >= 0:
                self.pool.cached.eviction.settle(node)
            assert len(entries(node)) == node.size > 0
            for i, entry in enumerate(entries(node)):
                assert entry.node is node and (entry.copies > 0) == (node.locks > 0) == (entry.block is None)
                name = node.key[i * width : (i + 1) * width]
                assert entry.block is None or entry.block.block_hash[:width] == name

    def listen(self, names: set[Any]) -> None:
        """Whoever keeps a set of hashes by the KV events has exactly what is cached, on both sides."""
        for event in self.manager.take_events():
            if isinstance(event, BlockStored):
                above = self.heard[event.parent_block_hash] if event.parent_block_hash else ()
                assert len(event.token_ids) == len(event.block_hashes) * BLOCK
                for i, name in enumerate(event.block_hashes):
                    self.heard[name] = above + tuple(event.token_ids[: (i + 1) * BLOCK])
            elif isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    del self.heard[name]
            else:
                assert isinstance(event, AllBlocksCleared)
                self.heard.clear()
        assert self.heard.keys() == {maybe_convert_block_hash(get_block_hash(name)) for name in names}
        assert set(self.heard.values()) == cached_prefixes(self.core)


def cached_prefixes(cache: PrefixCache) -> set[Prefix]:
    found: set[Prefix] = set()
    stack: list[tuple[Node, Prefix]] = [(cache.tree.root, ())]
    while stack:
        node, above = stack.pop()
        if node.slot >= 0:
            cache.eviction.settle(node)
        tokens = tuple(np.frombuffer(node.key[: node.size * cache.stride], "<u4").tolist())
        found.update(above + tokens[: (i + 1) * BLOCK] for i in range(node.size))
        stack.extend((child, above + tokens) for child in node.children.values())
    return found


def tokens_of(blocks: list[int], tail: int) -> list[int]:
    """Ids that say where they stand: s3-fifo's ghosts tell paths apart by the first blocks of nodes only."""
    return [(100 * number + at) * BLOCK + i for at, number in enumerate(blocks) for i in range(BLOCK)] + [
        7
    ] * tail


steps = st.lists(
    st.tuples(
        st.sampled_from(["start"] * 5 + ["go on"] * 3 + ["finish"] * 3 + ["reset"]),
        st.lists(st.integers(0, 2), min_size=0, max_size=7),
        st.integers(0, BLOCK - 1),
        st.integers(1, 12),
    ),
    max_size=40,
)


def drive(pair: Pair, plan: list[tuple[str, list[int], int, int]]) -> None:
    for step, blocks, tail, number in plan:
        if step == "start" and (blocks or tail):
            chunk = number if number % 2 else 10_000
            pair.start(tokens_of(blocks, tail), chunk)
        elif step == "go on" and pair.running:
            run = pair.running[number % len(pair.running)]
            while not pair.go_on(run, 1 + tail) and len(pair.running) > 1:
                victim = pair.running[-1]
                pair.finish(victim)  # preempted
                if victim is run:
                    break
        elif step == "finish" and pair.running:
            pair.finish(pair.running[number % len(pair.running)])
        elif step == "reset":
            pair.reset()
        pair.check()


@pytest.mark.parametrize("policy", ONLINE)
@settings(max_examples=150, deadline=None)
@given(plan=steps, blocks=st.integers(1, 14), seed=st.integers(0, 9))
def test_same_hits_and_evictions_as_the_core(policy: str, plan: Any, blocks: int, seed: int) -> None:
    drive(Pair(blocks, policy, seed), plan)


@pytest.mark.parametrize("policy", ONLINE)
def test_same_hits_over_a_long_random_run(policy: str) -> None:
    """Large requests, so that many blocks are evicted at once (the sampler's batches)."""
    rng = Random(1)
    pair = Pair(160, policy, seed=3)
    for _ in range(400):
        blocks = [rng.randrange(2) for _ in range(3)] + [
            rng.randrange(1000) for _ in range(rng.randrange(60))
        ]
        if rng.random() < 0.3 and pair.copies:  # resend something that was cached once
            prefix = rng.choice(list(pair.copies))
            pair.start(list(prefix) + [7] * rng.randrange(3), 10_000)
        else:
            pair.start(tokens_of(blocks, rng.randrange(BLOCK)), 10_000)
        while len(pair.running) > 1:
            pair.finish(pair.running[rng.randrange(len(pair.running))])
        if pair.running:
            pair.go_on(pair.running[0], 5)
        pair.check()
    assert pair.hits > 1000 and pair.core.evicted_blocks > 1000


def test_a_request_without_hits_protects_nothing_of_the_one_before_it() -> None:
    """RLT's new phase keeps the marks of the request being served only, also when that hit nothing."""
    kept = Counter[bool]()
    for seed in range(40):
        pair = Pair(4, "rlt", seed)
        for blocks in ([0], [1], [1]):
            pair.start(tokens_of(blocks, 1), 10_000)
            pair.finish(pair.running[0])
        pair.start(tokens_of([2, 3, 4], 0), 10_000)
        pair.check()
        kept[tuple(tokens_of([1], 0)) in cached_prefixes(pair.core)] += 1
    assert kept[True] > 5 and kept[False] > 5


@pytest.mark.parametrize("policy", ONLINE)
def test_what_stands_behind_a_lost_block_goes_with_it(policy: str) -> None:
    """evict_blocks (a connector's failed load) takes blocks in use or free; nothing leaks."""
    manager = make_manager(8, policy, events=True)
    pool = manager.block_pool
    first = make_request(tokens_of([0, 1, 2, 3], 1))
    manager.allocate_slots(first, 17)
    ids = [block.block_id for block in manager.get_blocks(first.request_id).blocks[0]]
    manager.evict_blocks({ids[1]})  # in use
    assert pool.cached.tree.total == 1
    first.append_output_token_ids([7] * BLOCK)  # what is computed behind it cannot be hit either
    first.num_computed_tokens = 17
    assert manager.allocate_slots(first, BLOCK) is not None
    assert pool.cached.tree.total == 1
    manager.free(first)
    assert pool.get_num_free_blocks() == 8 and pool._blank == 7
    assert len(pool.cached_block_hash_to_block) == 1
    again = make_request(tokens_of([0, 1, 2, 3], 1))
    blocks, hit, _ = manager.get_computed_blocks(again)
    assert hit == BLOCK
    manager.allocate_slots(again, 17 - hit, hit, blocks)
    manager.free(again)
    manager.evict_blocks({ids[0]})  # free, and three more behind it
    assert pool._blank == 8 and pool.cached.tree.total == len(pool.cached_block_hash_to_block) == 0
    other = make_request(tokens_of([5, 6, 7, 8, 9, 5, 6, 7], 0))
    assert manager.allocate_slots(other, 32) is not None, "every free block can be had"
    assert pool.get_num_free_blocks() == 0 and pool.cached.tree.total == 8
    manager.free(other)
    assert manager.reset_prefix_cache() and pool._blank == 8


@pytest.mark.parametrize("policy", ONLINE)
def test_a_pinned_block_behind_a_free_one_never_blocks_allocation(policy: str) -> None:
    """A connector may hold single blocks: no policy offers their prefix, and vLLM still gets every block."""
    for pinned in (0, 1, 2):
        manager = make_manager(4, policy, events=True)
        pool = manager.block_pool
        first = make_request(tokens_of([0, 1, 2], 1))
        manager.allocate_slots(first, 13)
        block = manager.get_blocks(first.request_id).blocks[0][pinned]
        manager.free(first)
        pool.touch([block])
        assert pool.get_num_free_blocks() == 3 and pool.cached.tree.locked == 1
        other = make_request(tokens_of([5, 6, 7], 0))
        assert manager.allocate_slots(other, 12) is not None
        pool.free_blocks([block])
        manager.free(other)
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == 4 and pool.cached.tree.locked == 0
        assert pool.cached.tree.total == len(pool.cached_block_hash_to_block) == 4 - pool._blank
        assert pool.cached.tree.total == (4 if pinned == 0 else 3)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), policy=st.sampled_from(ONLINE), plan=steps, blocks=st.integers(2, 10))
def test_pins_and_losses_anywhere_break_no_invariant(data: Any, policy: str, plan: Any, blocks: int) -> None:
    """Connectors touch, free and evict single blocks between all other steps."""
    manager = make_manager(blocks, policy, seed=1, events=True)
    pool = manager.block_pool
    running: list[Any] = []
    pins: list[Any] = []
    for step, prompt, tail, number in plan:
        if step == "start" and (prompt or tail):
            request = make_request(tokens_of(prompt, tail))
            computed, hit, _ = manager.get_computed_blocks(request)
            if manager.allocate_slots(request, request.num_tokens - hit, hit, computed) is not None:
                request.num_computed_tokens = request.num_tokens
                running.append(request)
        elif step == "go on" and running:
            request = running[number % len(running)]
            request.append_output_token_ids([5] * number)
            if manager.allocate_slots(request, request.num_tokens - request.num_computed_tokens) is not None:
                request.num_computed_tokens = request.num_tokens
            else:
                running.remove(request)
                manager.free(request)
        elif step == "finish" and running:
            manager.free(running.pop(number % len(running)))
        elif step == "reset":
            what = data.draw(st.sampled_from(["pin", "unpin", "evict"]))
            cached = [block for block in pool.blocks if block.block_hash is not None]
            if what == "pin" and cached:
                pins.append(cached[number % len(cached)])
                pool.touch([pins[-1]])
            elif what == "unpin" and pins:
                pool.free_blocks([pins.pop(number % len(pins))])
            elif what == "evict" and cached:
                manager.evict_blocks({cached[number % len(cached)].block_id})
        free = pool.free_block_queue.get_all_free_blocks()
        assert len(free) == pool.get_num_free_blocks()
        hashed = [block.block_hash is not None for block in free]
        assert hashed == sorted(hashed) and pool._blank == hashed.count(False)
        tree = pool.cached
        seen, stack = [0, 0], list(tree.tree.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.slot >= 0:
                tree.eviction.settle(node)
            assert all(entry.node is node for entry in entries(node)) and len(entries(node)) == node.size
            seen[0] += node.size
            seen[1] += node.size * (node.locks > 0)
        assert seen == [tree.tree.total, tree.tree.locked]
        assert sum(hashed) == tree.tree.total - tree.tree.locked
    for request in running:
        manager.free(request)
    pool.free_blocks(pins)
    last = make_request(tokens_of(list(range(50, 50 + blocks)), 0))
    assert manager.allocate_slots(last, blocks * BLOCK) is not None, "every block can be had again"


def test_what_is_not_supported_is_refused_by_name() -> None:
    import torch
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    def build(*specs: Any, caching: bool = True) -> Any:
        config = KVCacheConfig(8, [], [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)])
        with plugin_on("rlt"):
            return KVCacheManager(config, 1000, BLOCK, BLOCK, enable_caching=caching)

    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    full, window = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=8)
    for specs in ((window,), (full, window)):
        with pytest.raises(Unsupported, match=r"SlidingWindowSpec.*--disable-hybrid-kv-cache-manager.*unset"):
            build(*specs)
    assert type(build(full, caching=False).block_pool) is kv_cache_coordinator.BlockPool
    assert type(build(full).block_pool) is not kv_cache_coordinator.BlockPool


def test_an_unknown_version_or_fork_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.block_pool import BlockPool

    install.check_version(install.VERSIONS[-1] + ".7+cpu")
    with pytest.raises(Unsupported, match=r"supports vLLM .*0\.32.x.* and vLLM 0\.1\.2 is installed"):
        install.check_version("0.1.2")
    install.check_seams()
    monkeypatch.setattr(BlockPool, "free_blocks", lambda self, blocks, order: None)
    with pytest.raises(Unsupported, match=r"block_pool\.BlockPool\.free_blocks\(ordered_blocks\) is not as"):
        install.check_seams()
