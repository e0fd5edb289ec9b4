"""SGLang's real RadixCache with the plugin, beside the core's PrefixCache with the same policy and seed.

Over random sequences of requests the two must give the same hits and hold the same prefixes, every KV slot
must be free, cached or held exactly once and hold the KV it is cached for, and the KV events must replay to
the cache's content.
"""

from __future__ import annotations

from importlib.util import find_spec
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.cache import EVICTIONS, PrefixCache, make_eviction
from kvist.model import pack

if find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: make test-sglang runs this", allow_module_level=True)

from sglang_radix import Engine, EvictParams, make_cache

ONLINE = sorted(set(EVICTIONS) - {"belady"})
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
PAGES = [1, 16]
Prefix = tuple[int, ...]


@st.composite
def prompts(draw: st.DrawFn, page: int) -> Prefix:
    """Prompts over few distinct blocks, so that prefixes are shared and nodes split; some end in a page."""
    blocks = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    tail = draw(st.integers(0, page - 1)) if page > 1 else 0
    whole = tuple(8 * block + i % 5 for block in blocks for i in range(page))
    return whole + (99,) * tail


def steps(page: int) -> st.SearchStrategy[list[tuple[str, Any]]]:
    step = st.one_of(
        st.tuples(st.just("start"), st.tuples(prompts(page), st.sampled_from([None, None, "lora"]))),
        st.tuples(st.just("start"), st.tuples(prompts(page), st.none())),
        st.tuples(st.just("finish"), st.integers(0, 7)),
        st.tuples(st.just("evict"), st.integers(0, 6 * page)),
        st.tuples(st.just("reset"), st.none()),
    )
    return st.lists(step, max_size=40)


class Pair:
    """The engine and the core's cache, driven together."""

    def __init__(self, page: int, blocks: int, policy: str, seed: int) -> None:
        self.page, self.now = page, 0
        self.engine = Engine(make_cache(blocks * page, page, policy, seed=seed, events=True))
        self.core = PrefixCache(blocks * page, make_eviction(policy, rng=Random(seed)), block_size=page)
        self.open: list[tuple[Any, Any, int]] = []

    def start(self, tokens: Prefix, extra: str | None) -> None:
        core, salt = self.core, (extra or "").encode()
        self.now += 1
        match = core.match(_packed(tokens), self.now, salt)
        core.lock(match.node)
        need = -(-(len(tokens) - match.length) // self.page)
        hit, run = self.engine.start(tokens, extra)
        assert hit == match.length
        if core.reserve(need):
            assert run is not None
            self.open.append((run, match, need))
        else:
            assert run is None
            core.unlock(match.node)

    def finish(self, which: int) -> None:
        if not self.open:
            return
        run, match, reserved = self.open.pop(which % len(self.open))
        core, salt = self.core, (run.extra or "").encode()
        self.now += 1
        new = core.insert(_packed(run.tokens), self.now, salt).new_blocks
        core.release(reserved - new)
        core.unlock(match.node)
        assert self.engine.finish(run) == new * self.page

    def evict(self, tokens: int) -> None:
        freed = self.core.evict(-(-tokens // self.page)) * self.page
        assert self.engine.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted == freed

    def reset(self, _: None) -> None:
        if not self.open:
            self.core.reset()
            self.engine.cache.reset()
            self.engine.allocator.clear()  # as SGLang's flush does

    def check(self) -> None:
        self.engine.check()
        cache, core = self.engine.cache, self.core
        assert (cache.evictable_size(), cache.protected_size()) == (core.evictable, core.locked)
        assert self.engine.allocator.available_size() == core.free
        assert {(extra, prefix) for _, extra, prefix in self.engine.nodes()} == set(_prefixes(core))


def _packed(tokens: Prefix) -> bytes:
    return pack(np.array(tokens, dtype=np.uint32))


def _prefixes(core: PrefixCache) -> list[tuple[str | None, Prefix]]:
    found: list[tuple[str | None, Prefix]] = []
    stack: list[tuple[Any, str | None, Prefix]] = [(core.tree.root, None, ())]
    while stack:
        node, extra, above = stack.pop()
        for child in node.children.values():
            if child.slot >= 0:
                core.eviction.settle(child)
            tokens = tuple(np.frombuffer(child.key, np.uint32)[: child.size * core.block_size].tolist())
            named = "lora" if child.first.startswith(b"lora") else extra
            found.append((named, above + tokens))
            stack.append((child, named, above + tokens))
    return found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("policy", ONLINE)
def test_same_hits_and_content_as_the_core(policy: str, page: int) -> None:
    @PROPERTY
    @given(steps(page), st.integers(2, 24), st.integers(0, 3))
    def run(sequence: list[tuple[str, Any]], blocks: int, seed: int) -> None:
        pair = Pair(page, blocks, policy, seed)
        for name, value in sequence:
            if name == "start":
                pair.start(*value)
            else:
                getattr(pair, name)(value)
            pair.check()

    run()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("policy", ONLINE)
def test_long_run_with_the_same_hits(policy: str, page: int) -> None:
    """Longer prompts and larger evictions than hypothesis tries: batches of draws, long edges."""
    random = Random(7)
    pair = Pair(page, 600, policy, 5)
    shared = [tuple(random.randrange(1000) for _ in range(40 * page)) for _ in range(6)]
    for step in range(150):
        base = random.choice(shared)
        own = tuple(random.randrange(1000) for _ in range(random.randrange(60 * page)))
        pair.start(base[: random.randrange(page, len(base))] + own, None)
        if len(pair.open) > 2 or random.random() < 0.5:
            pair.finish(random.randrange(8))
        if step % 10 == 0:
            pair.check()
    pair.check()
    assert pair.core.evicted_blocks > 600
    assert pair.engine.cache.host.evicted_blocks == pair.core.evicted_blocks
