"""Defined answers at the edges, each policy's rule against a direct restatement, and the offline optimum."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memoize
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import PrefixSet
from test_cache_property import Blocks, cached_prefixes, prompt_of

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.belady import Future
from kvist.model import Query, pack

ONLINE = ["l-lru", "rlt", "l-lfu", "fifo", "slru", "random-leaf"]


def new_cache(name: str, capacity: int, block_size: int = 1) -> PrefixCache:
    return PrefixCache(capacity, make_eviction(name, rng=Random(2)), block_size=block_size)


@pytest.mark.parametrize("name", ONLINE)
def test_empty_prompt_hits_nothing_and_caches_nothing(name: str) -> None:
    cache = new_cache(name, 8)
    assert cache.serve(b"", 0) == 0
    assert cache.match(b"", 1).node is cache.tree.root
    assert cache.cached == 0


@pytest.mark.parametrize("name", ONLINE)
def test_a_request_longer_than_the_cache_keeps_the_front_that_fits(name: str) -> None:
    cache = new_cache(name, 8)
    long = pack(range(20))
    assert cache.serve(pack([99, 98]), 0) == 0
    assert cache.serve(long, 1) == 0
    assert cache.cached == 8 and cache.peek(long) == 8
    assert cache.serve(long, 2) == 8


@pytest.mark.parametrize("name", ONLINE)
def test_an_all_locked_cache_evicts_nothing_and_refuses_room(name: str) -> None:
    cache = new_cache(name, 8)
    prompt = pack(range(8))
    cache.serve(prompt, 0)
    match = cache.match(prompt, 1)
    cache.lock(match.node)
    assert cache.evictable == 0 and cache.evict(3) == 0
    assert not cache.reserve(1)
    assert cache.serve(pack([50, 51]), 2) == 0 and cache.peek(pack([50, 51])) == 0
    cache.unlock(match.node)
    assert cache.reserve(3) and cache.cached == 5 and cache.reserved == 3


def test_a_refused_reservation_evicts_nothing() -> None:
    cache = new_cache("rlt", 8)
    cache.serve(pack(range(6)), 0)
    match = cache.match(pack(range(3)), 1)
    cache.lock(match.node)
    assert not cache.reserve(6)
    assert cache.cached == 6 and cache.reserved == 0
    assert cache.reserve(5) and cache.cached == 3


def test_rlt_frees_leaves_of_a_query_that_was_matched_but_not_admitted() -> None:
    cache = new_cache("rlt", 4)
    cache.serve(pack(range(4)), 0)
    cache.match(pack(range(4)), 1)  # matched, never locked
    assert cache.evict(4) == 4 and cache.cached == 0


def test_errors_name_the_field_and_the_fix() -> None:
    with pytest.raises(ValueError, match="capacity must hold at least one block of 16 tokens, not 15"):
        new_cache("rlt", 15, 16)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        new_cache("rlt", 15, 0)
    with pytest.raises(ValueError, match="unknown eviction policy 'lru': choose one of l-lru"):
        make_eviction("lru")
    with pytest.raises(ValueError, match=r"eviction policy rlt: .*'k'"):
        make_eviction("rlt", k=2)
    with pytest.raises(ValueError, match="protect_after"):
        make_eviction("slru", protect_after=0)
    cache = new_cache("rlt", 8)
    with pytest.raises(ValueError, match="release"):
        cache.release(1)
    cache.serve(pack(range(4)), 0)
    match = cache.match(pack(range(4)), 1)
    with pytest.raises(ValueError, match="without a matching lock"):
        cache.unlock(match.node)
    cache.lock(match.node)
    with pytest.raises(ValueError, match="while requests run"):
        cache.reset()


def test_a_running_request_owns_its_reservation_until_it_is_inserted() -> None:
    cache = new_cache("l-lru", 10)
    match = cache.match(pack(range(6)), 0)
    cache.lock(match.node)
    assert cache.reserve(6) and cache.free == 4
    inserted = cache.insert(pack(range(6)), 1)
    assert inserted.new_blocks == 6 and cache.reserved == 0 and cache.cached == 6
    # A second request computed the same prompt at the same time: nothing new, it gives its blocks back.
    assert cache.reserve(4)
    assert cache.insert(pack(range(4)), 2).new_blocks == 0
    cache.release(4)
    assert cache.free == 4


# Restatements of the ranking policies over block prefixes: (born, last, hits) -> key, smallest evicted.
RULES: dict[str, Callable[[tuple[int, int, int]], tuple[int, ...]]] = {
    "l-lru": lambda use: (use[1],),
    "fifo": lambda use: (use[0],),
    "l-lfu": lambda use: (use[2], use[1]),
    "slru": lambda use: (int(use[2] >= 2), use[1]),
}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), max_size=40),
    capacity=st.integers(6, 12),
)
def test_ranking_policies_follow_their_rule(name: str, prompts: list[Blocks], capacity: int) -> None:
    """Every victim has the smallest rank among the leaf blocks at its turn (ties may fall either way)."""
    cache = new_cache(name, capacity)
    oracle = PrefixSet()
    use: dict[Blocks, tuple[int, int, int]] = {}
    for now, blocks in enumerate(prompts):
        hit = oracle.match(blocks)
        before = set(oracle.prefixes)
        cache.serve(prompt_of(blocks, 1), now)
        after = cached_prefixes(cache)
        path = [blocks[:i] for i in range(1, len(blocks) + 1)]
        for prefix in path[:hit]:
            use[prefix] = (use[prefix][0], now, use[prefix][2] + 1)
        oracle.lock(blocks[:hit])
        gone = before - after
        while gone:  # replay the victims from the worst-ranked leaf on
            leaves = oracle.leaves()
            worst = min(RULES[name](use[p]) for p in leaves)
            victims = [p for p in leaves & gone if RULES[name](use[p]) == worst]
            assert victims, f"{name} passed over {worst}"
            oracle.evict(victims[0])
            gone.remove(victims[0])
        oracle.unlock(blocks[:hit])
        for prefix in path[hit:]:
            use[prefix] = (now, now, 0)
        oracle.prefixes = after


def optimal_misses(requests: list[Blocks], capacity: int) -> int:
    """Fewest misses of any eviction schedule, by trying them all."""

    @memoize
    def best(at: int, state: frozenset[Blocks]) -> int:
        if at == len(requests):
            return 0
        blocks = requests[at]
        path = frozenset(blocks[:i] for i in range(1, len(blocks) + 1))
        missing = len(path - state)
        excess = len(state | path) - capacity
        states = {state | path}
        for _ in range(max(excess, 0)):
            nxt = set()
            for s in states:
                inner = {p[:-1] for p in s}
                nxt.update(s - {p} for p in s if p not in inner and p not in path)
            states = nxt
        return missing + min(best(at + 1, s) for s in states)

    return best(0, frozenset())


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=9),
    capacity=st.integers(3, 5),
)
def test_belady_is_optimal(requests: list[Blocks], capacity: int) -> None:
    queries = [Query(i, prompt_of(blocks, 1)) for i, blocks in enumerate(requests)]
    cache = PrefixCache(capacity, make_eviction("belady", future=Future(queries, 4)), block_size=1)
    hits = sum(cache.serve(q.prompt, i, query=q) for i, q in enumerate(queries))
    assert sum(map(len, requests)) - hits == optimal_misses(requests, capacity)


def test_belady_refuses_a_request_it_was_not_told_of() -> None:
    cache = PrefixCache(8, make_eviction("belady", future=Future([], 4)), block_size=1)
    with pytest.raises(ValueError, match="not in the future"):
        cache.serve(pack([1]), 0, query=Query(5, pack([1])))
    with pytest.raises(ValueError, match="another block size"):
        PrefixCache(32, make_eviction("belady", future=Future([], 4)), block_size=16)


@pytest.mark.parametrize("name", ["rlt", "random-leaf"])
@pytest.mark.parametrize("block_size", [1, 16])
def test_large_random_runs_keep_the_accounts(name: str, block_size: int) -> None:
    """Batches of hundreds of draws over hundreds of leaves: sizes kept in arrays agree with the tree."""
    rng = Random(7)
    cache = new_cache(name, 3000 * block_size, block_size)
    hits = 0
    for now in range(400):
        fork = tuple(rng.randrange(4) for _ in range(4))
        blocks = fork + tuple(rng.randrange(60) for _ in range(rng.choice([3, 40, 300])))
        hits += cache.serve(prompt_of(blocks, block_size), now)
        if now % 20 == 0:
            assert len(cached_prefixes(cache)) * block_size == cache.cached <= cache.capacity
            assert cache.peek(prompt_of(blocks, block_size)) == len(blocks) * block_size
    assert cache.evicted_blocks > 10_000 and hits > 0
    assert cache.evict(10**6) * block_size == cache.capacity
    assert cache.cached == 0


@pytest.mark.parametrize("name", ONLINE)
def test_same_seed_same_hits(name: str) -> None:
    rng = Random(3)
    prompts = [prompt_of(tuple(rng.randrange(5) for _ in range(40)), 1) for _ in range(200)]

    def run() -> list[int]:
        cache = new_cache(name, 300)
        return [cache.serve(prompt, now) for now, prompt in enumerate(prompts)]

    first = run()
    assert first == run()
    assert any(a != b for a, b in pairwise(first))
