"""The fast policies against naive restatements of their rules."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.base import EvictionPolicy
from kvist.cache.lhd import AGES, LHD
from kvist.cache.lpc import LPC
from kvist.cache.marconi import Marconi
from kvist.model import Query, pack
from kvist.prefix.tree import Node


def flat_misses(name: str, size: int, names: list[int]) -> list[bool]:
    """Which requests of one-token prompts miss."""
    cache = PrefixCache(size, make_eviction(name, rng=Random(0)))
    return [cache.serve(pack([n]), now) == 0 for now, n in enumerate(names)]


def sieve(size: int, names: list[int]) -> list[bool]:
    """The paper's algorithm on a list, oldest first; the hand is a position in it."""
    queue: list[int] = []
    visited: dict[int, bool] = {}
    hand, missed = 0, []
    for name in names:
        missed.append(name not in visited)
        if name in visited:
            visited[name] = True
            continue
        if len(queue) == size:
            while visited[queue[hand % size]]:
                visited[queue[hand % size]] = False
                hand = hand % size + 1
            hand %= size
            del visited[queue.pop(hand)]
        queue.append(name)
        visited[name] = False
    return missed


def s3_fifo(size: int, names: list[int]) -> list[bool]:
    """The paper's algorithm on lists, head last; small queue of a tenth, ghosts as many as main."""
    small: list[int] = []
    main: list[int] = []
    ghost: list[int] = []
    uses: dict[int, int] = {}
    missed = []
    for name in names:
        missed.append(name not in uses)
        if name in uses:
            uses[name] = min(uses[name] + 1, 3)
            continue
        gone = len(uses) < size
        while not gone:
            if small and (len(small) > 0.1 * size or not main):
                old = small.pop(0)
                if uses[old] > 1:
                    main.append(old)
                    uses[old] = 0
                else:
                    del uses[old]
                    ghost.append(old)
                    while len(ghost) > 0.9 * size:
                        ghost.pop(0)
                    gone = True
            else:
                old = main.pop(0)
                if uses[old]:
                    main.append(old)
                    uses[old] -= 1
                else:
                    del uses[old]
                    gone = True
        if name in ghost:
            ghost.remove(name)
            main.append(name)
        else:
            small.append(name)
        uses[name] = 0
    return missed


def lru_2(size: int, names: list[int]) -> list[bool]:
    cached: dict[int, list[int]] = {}
    missed = []
    for now, name in enumerate(names):
        missed.append(name not in cached)
        if name in cached:
            cached[name] = [*cached[name], now]
            continue
        if len(cached) == size:
            del cached[
                min(cached, key=lambda n: (cached[n][-2] if len(cached[n]) > 1 else -1, cached[n][-1]))
            ]
        cached[name] = [now]
    return missed


@pytest.mark.parametrize(("name", "rule"), [("sieve", sieve), ("s3-fifo", s3_fifo), ("lru-k", lru_2)])
@settings(max_examples=200, deadline=None)
@given(names=st.lists(st.integers(0, 30), max_size=150), size=st.integers(1, 25))
def test_flat_rule(
    name: str, rule: Callable[[int, list[int]], list[bool]], names: list[int], size: int
) -> None:
    assert flat_misses(name, size, names) == rule(size, names)


class Naive(EvictionPolicy):
    """Looks at every leaf for every block, with what the test notes down of each prefix."""

    name = "naive"
    description = source = ""

    def __init__(self, worst: Callable[[Naive, Node], object]) -> None:
        super().__init__()
        self.worst = worst
        self.last: dict[bytes, float] = {}
        self.length: dict[bytes, int] = {}

    def prefix(self, node: Node) -> bytes:
        above = b"" if node.parent is None else self.prefix(node.parent)
        return above + node.key[: node.size * self.cache.stride]

    def note(self, prompt: bytes, now: float) -> None:
        for i in range(4, len(prompt) + 1, 4):
            self.last[prompt[:i]] = now
            self.length[prompt[:i]] = len(prompt) // 4

    def leaves(self) -> list[Node]:
        found, stack = [], list(self.cache.tree.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children and not node.locks:
                found.append(node)
        return found

    def evict(self, blocks: int) -> int:
        freed = 0
        while freed < blocks and (leaves := self.leaves()):
            self.cache.trim(min(leaves, key=lambda n: self.worst(self, n)), 1)  # type: ignore[arg-type,return-value]
            freed += 1
        return freed


def tree_hits(policy: EvictionPolicy, prompts: list[tuple[int, ...]], size: int) -> list[int]:
    cache = PrefixCache(size, policy)
    hits = []
    for now, tokens in enumerate(prompts):
        prompt = pack(tokens[:size])
        hits.append(cache.serve(prompt, now))
        if isinstance(policy, Naive):
            policy.note(prompt, now)
    return hits


prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(prompts=prompts, size=st.integers(8, 20), threshold=st.integers(0, 6))
def test_t_lru_frees_what_the_next_turn_can_spare(
    prompts: list[tuple[int, ...]], size: int, threshold: int
) -> None:
    def worst(policy: Naive, leaf: Node) -> object:
        prefix = policy.prefix(leaf)
        safe = len(prefix) // 4 > policy.length[prefix] - threshold
        return not safe, policy.last[prefix]

    fast = make_eviction("t-lru", threshold=threshold, next_prompt=0)
    assert tree_hits(fast, prompts, size) == tree_hits(Naive(worst), prompts, size)


@settings(max_examples=100, deadline=None)
@given(prompts=prompts, size=st.integers(8, 20), alpha=st.sampled_from([0.0, 0.3, 3.0]))
def test_marconi_ranks_by_recency_and_position(
    prompts: list[tuple[int, ...]], size: int, alpha: float
) -> None:
    """Each victim of one-block calls is the leaf with the least utility."""
    policy = Marconi(alpha=alpha)
    cache = PrefixCache(size, policy)
    naive = Naive(lambda *_: 0)
    naive.cache = cache
    for now, tokens in enumerate(prompts):
        cache.serve(pack(tokens), now)
        naive.note(pack(tokens), now)
    while cache.cached:
        leaves = naive.leaves()
        last = [naive.last[naive.prefix(n)] for n in leaves]
        middle = [len(naive.prefix(n)) / 4 - n.size / 2 for n in leaves]
        scale = [(max(v) - min(v)) or 1.0 for v in (last, middle)]
        utility = {
            naive.prefix(n): (a - min(last)) / scale[0] + alpha * (m - min(middle)) / scale[1]
            for n, a, m in zip(leaves, last, middle, strict=True)
        }
        before = set(utility)
        cache.evict(1)
        (gone,) = before - {naive.prefix(n) for n in naive.leaves()}
        assert utility[gone] == pytest.approx(min(utility.values()))


def test_marconi_fits_alpha_by_replay() -> None:
    policy = Marconi()
    cache = PrefixCache(50, policy)
    rng = Random(3)
    for now in range(400):
        prompt = pack([rng.randrange(5), *range(rng.choice([2, 30]))])
        cache.serve(prompt, now, query=Query(now, prompt))
    assert policy._seen is None
    assert policy.alpha in (0.0, 0.1, 0.3, 1.0, 3.0)
    assert Marconi(alpha=0.0)._seen is None


def test_lhd_density_is_hits_over_lifetime() -> None:
    policy = LHD(rng=Random(0))
    PrefixCache(64, policy)
    rng = np.random.default_rng(1)
    hits, evictions = rng.integers(0, 9, (2, policy._hits.shape[0], AGES)).astype(float)
    policy._hits, policy._evictions = hits.copy(), evictions.copy()
    policy._learn()
    for kind, age in ((0, 0), (3, 17), (8, AGES - 1)):
        later = range(age, AGES)
        lived = sum((hits[kind, a] + evictions[kind, a]) * (a - age + 1) for a in later)
        assert policy.density[kind][age] == pytest.approx(sum(hits[kind, a] for a in later) / lived)


def test_lhd_keeps_what_is_used_again() -> None:
    """Two hot prompts between scans: never seen again after the policy has learned."""
    cache = PrefixCache(40, make_eviction("lhd", rng=Random(0)))
    hot = [pack([1] * 10), pack([2] * 10)]
    hits = 0
    for now in range(600):
        hits += cache.serve(hot[now % 2], now) if now % 3 else 0 * cache.serve(pack([now + 9] * 10), now)
    assert hits > 0.9 * 400 * 10


def test_lpc_learns_which_leaves_go_on() -> None:
    """Short pieces are always continued, long ones never: the probabilities part."""
    policy = LPC()
    cache = PrefixCache(400, policy)
    number = 10
    for now in range(0, 3000, 3):
        number += 1
        cache.serve(pack([number] * 4), now)
        cache.serve(pack([number] * 8), now + 1)
        cache.serve(pack([-number % 2**32] * 90), now + 2)
    root = (1.0, 0.69)
    short = policy.probability((*root, 0.0, np.log1p(4) / 8, 0.69, 0.0, 1.0))
    long = policy.probability((*root, 0.0, np.log1p(90) / 8, 0.69, 0.0, 1.0))
    assert short > 3 * long


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("lru-k", {"k": 0}),
        ("s3-fifo", {"small": 1.0}),
        ("marconi", {"alpha": -1}),
        ("t-lru", {"threshold": -1}),
    ],
)
def test_wrong_parameters(name: str, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_eviction(name, **wrong)
