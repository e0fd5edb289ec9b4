"""Hedge's accounts against brute force: records, phases, clean and other misses, exposure, safety."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache import PrefixCache, make_eviction
from kvist.cache.hazard import HazardTable
from kvist.cache.hedge import SLACK, Hedge
from kvist.cache.history import MEMORY
from kvist.cache.reuse import BUCKET, EDGES, FADE, RING, WIDTH, ReuseCounts
from kvist.model import pack
from kvist.prefix.tree import Node

Blocks = tuple[int, ...]
prompts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple), min_size=1, max_size=120)


def spelled(node: Node) -> Blocks:
    """The path's tokens up to the node's end."""
    above = spelled(node.parent) if node.parent is not None else ()
    return above + tuple(int(t) for t in np.frombuffer(node.key[: node.size * 4], "<u4"))


def nodes(root: Node) -> list[Node]:
    found, stack = [], list(root.children.values())
    while stack:
        found.append(node := stack.pop())
        stack.extend(node.children.values())
    return found


class Phases:
    """The phases of a request sequence block by block, from their definition."""

    def __init__(self, size: int) -> None:
        self.size, self.number = size, 0
        self.last: dict[Blocks, int] = {}  # phase of the last request
        self.clean = self.other_misses = 0  # over all phases

    def serve(self, blocks: Blocks, hit: int) -> None:
        prefixes = [blocks[:i] for i in range(1, len(blocks) + 1)]
        for i, prefix in enumerate(prefixes):
            seen = self.last.get(prefix, -9)
            if seen != self.number and list(self.last.values()).count(self.number) == self.size:
                self.number += 1
                for above in prefixes[:i]:
                    self.last[above] = self.number
            if self.last.get(prefix, -9) < self.number - 1:
                self.clean += 1
            elif i >= hit:
                self.other_misses += 1
            self.last[prefix] = self.number


@settings(max_examples=150, deadline=None)
@given(requests=prompts, size=st.integers(9, 20), seed=st.integers(0, 5))
def test_accounts(requests: list[Blocks], size: int, seed: int) -> None:
    policy = Hedge(rng=Random(seed))
    cache = PrefixCache(size, policy)
    phases = Phases(size)
    harmonic = sum(1 / k for k in range(1, size + 1))
    spent = earned = 0.0
    for now, blocks in enumerate(requests):
        trusted, before, debt = not policy.marking, policy.history.phase, policy.budget
        clean, other = phases.clean, phases.other_misses
        phases.serve(blocks, cache.serve(pack(blocks), now))
        history = policy.history
        assert history.phase == phases.number
        assert history.distinct == list(phases.last.values()).count(phases.number) <= size
        if history.phase == before:  # the budget earns H_n for a clean block, and trust pays for the others
            earned, spent = harmonic * (phases.clean - clean), float(phases.other_misses - other)
            assert policy.budget == pytest.approx(debt + earned - (spent if trusted else 0))
        assert policy.marking or policy.budget >= 0
        known: Counter[Blocks] = Counter()
        for node in nodes(history.tree.root):
            path = spelled(node)
            for i in range(len(path) - node.size + 1, len(path) + 1):
                known[path[:i]] += 1
                assert phases.last[path[:i]] >= phases.number - 1 or node.state.phase < phases.number - 1
                if phases.last[path[:i]] >= phases.number - 1:
                    assert node.state.phase == phases.last[path[:i]]
        assert max(known.values()) == 1
        recent = {p for p, phase in phases.last.items() if phase >= phases.number - 1}
        assert recent <= set(known), "blocks of the last two phases are never forgotten"
        for node in nodes(cache.tree.root):  # one record for each cached node, which starts where it starts
            here = node.state
            assert here.state.cached is node
            assert spelled(here)[: len(spelled(node))] == spelled(node)
            assert len(spelled(here)) - here.size == len(spelled(node)) - node.size
        live = Counter(node.state.kind for node in nodes(history.tree.root) for _ in range(node.size))
        live.pop(-1, None)  # the request that was just served is classified with the next
        assert {kind: count for kind, count in enumerate(policy.counts.alive()) if count} == live
    leaves = {n for n in nodes(cache.tree.root) if not n.children}
    assert {n for bucket in policy._buckets.values() for n in bucket} == leaves
    assert SLACK * max(map(len, requests)) + harmonic * size >= policy.budget - 1e-9


def test_marking_evicts_ancient_blocks_first_and_never_marked_ones() -> None:
    rng = Random(4)
    policy = Hedge(rng=Random(1))
    cache = PrefixCache(30, policy)
    checked = 0
    for now in range(3000):
        if now % 50 == 0:
            policy.budget = -1e9  # as after a costly mistake: marking from the next phase on
        before = {spelled(n): n.state.state.phase for n in nodes(cache.tree.root)}
        leaf_phases = [n.state.state.phase for n in nodes(cache.tree.root) if not n.children]
        marking, phase = policy.marking, policy.history.phase
        cache.serve(pack([rng.randrange(60)]), now)
        gone = set(before) - {spelled(n) for n in nodes(cache.tree.root)}
        if not marking or policy.history.phase != phase:
            continue
        for path in gone:
            checked += 1
            assert before[path] < phase
            if any(p < phase - 1 for p in leaf_phases):
                assert before[path] < phase - 1
    assert checked > 100


def test_memory_is_bounded() -> None:
    policy = Hedge(rng=Random(0))
    cache = PrefixCache(64, policy)
    rng = Random(1)
    for now in range(6000):
        cache.serve(pack([rng.randrange(3), now % 7, *([now] * 5)]), now)
        assert policy.history.tree.total <= MEMORY * 64 + 4 * 64
    listed = sum(map(len, policy.history._by_epoch.values())) + len(policy.history._kept)
    for now in range(6000, 16000):  # nothing new any more: lists must not grow with hits
        cache.serve(pack([now % 3]), now)
    assert sum(map(len, policy.history._by_epoch.values())) + len(policy.history._kept) <= 2 * listed + RING


def test_identical_for_identical_seeds() -> None:
    def run(seed: int) -> list[int]:
        cache = PrefixCache(40, make_eviction("hedge", rng=Random(seed)))
        rng = Random(9)
        return [cache.serve(pack([rng.randrange(6), rng.randrange(9)] * 3), now) for now in range(500)]

    assert run(3) == run(3)


def test_unique_suffixes_go_before_templates() -> None:
    """40 templates that fit, each time with a new tail: after learning nearly all templates stay."""
    cache = PrefixCache(40 * 20 + 60, make_eviction("hedge", rng=Random(0)))
    lru = PrefixCache(40 * 20 + 60, make_eviction("l-lru"))
    rng, hits, base = Random(2), 0, 0
    for now in range(3000):
        prompt = pack([rng.randrange(40)] * 20 + [100 + now] * 20)
        got, old = cache.serve(prompt, now), lru.serve(prompt, now)
        if now >= 1000:
            hits, base = hits + got, base + old
    assert hits > 0.95 * 2000 * 20 > 1.3 * base


Step = tuple[str, int, int]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("new"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.just("use"), st.integers(0, 30), st.integers(0, 3)),
        st.tuples(st.just("lose"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("wait"), st.sampled_from((1, 1, 2, 7, 40, 500, 1500)), st.just(0)),
        st.tuples(st.just("look"), st.just(0), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_counts_are_those_of_watching_each_block(script: list[Step]) -> None:
    counts = ReuseCounts((3, 1))
    watched: list[tuple[int, int, int]] = []  # class, epoch of last use, blocks
    ended: list[tuple[int, int, int, int, bool]] = []  # and the epoch of the end, and whether it was a use
    for what, first, second in script:
        if what == "wait":
            counts.epoch += first
        elif what == "look":
            counts.collect()
        elif what == "new":
            watched.append((first, counts.epoch, second))
            counts.add(*watched[-1])
        elif watched:
            kind, epoch, blocks = block = watched.pop(first % len(watched))
            ended.append((*block, counts.epoch, what == "use"))
            if what == "use":
                counts.used(*block)
                counts.add(kind, epoch, -blocks)
                watched.append((second, counts.epoch, blocks))
                counts.add(*watched[-1])
            else:
                counts.lost(*block)
        counts.served()
    events, exposure = np.zeros((4, len(EDGES))), np.zeros((4, len(EDGES)))
    now = counts.epoch
    for kind, epoch, blocks, end, used in ended + [(*block, now, False) for block in watched]:
        age = min(end - epoch, RING - 1)
        weight = blocks * (1 - FADE) ** (age + now - end)
        for bucket, (start, width) in enumerate(zip(EDGES, WIDTH, strict=True)):
            exposure[kind, bucket] += weight * min(max(age + 0.5 - start, 0), width)
        events[kind, BUCKET[age]] += weight * used
    found_events, found_exposure = counts.collect()
    assert set(counts.seen) == {kind for kind, *_ in ended} | {kind for kind, *_ in watched}
    np.testing.assert_allclose(found_events, events[counts.seen], atol=1e-9)
    np.testing.assert_allclose(found_exposure, exposure[counts.seen], atol=1e-9)


def test_hazards_are_events_over_exposure() -> None:
    """Blocks used again after exactly five epochs, or never: the table finds both rates and ranks by them."""
    table = HazardTable(((2,),), (16,))
    counts = table.counts
    for epoch in range(400):
        counts.epoch = epoch
        for kind in (0, 1):
            counts.add(kind, epoch, 50)
        if epoch >= 5:
            counts.used(0, epoch - 5, 50)
            counts.add(0, epoch - 5, -50)
        counts.served()
    table.learn()
    hazard, _ = table.hazards()
    five = BUCKET[5]
    assert hazard[0, five] > 5 * hazard[0, 0]
    assert hazard[1].max() < 0.02
    assert min(table.rank(0, counts.epoch - age) for age in range(5)) > 10 * table.rank(1, counts.epoch - 3)


def test_classes_that_differ_by_chance_alone_are_one() -> None:
    """Two features that say nothing, and one that does: only its levels get different hazards."""
    rng = np.random.default_rng(5)
    table = HazardTable(((4, 3),), (16,))
    counts = table.counts
    kinds = [int(kind) for kind in rng.integers(12, size=3000)]
    for epoch, kind in enumerate(kinds):
        counts.epoch = epoch
        counts.add(kind, epoch, 20)
        if epoch >= 4:
            old = kinds[epoch - 4], epoch - 4, 20
            if rng.random() < (0.9 if old[0] % 3 == 2 else 0.3):
                counts.used(*old)
                counts.add(old[0], old[1], -20)
            else:
                counts.lost(*old)
        counts.served()
    hazard, _ = table.hazards()
    levels = hazard[:, BUCKET[4]].reshape(4, 3)
    assert np.ptp(levels, axis=0).max() < 0.1 * levels.mean()
    assert levels[:, 2].min() > 1.5 * levels[:, :2].max()
