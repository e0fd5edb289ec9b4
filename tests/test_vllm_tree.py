"""What the vLLM plugin keeps of cached blocks, without vLLM: hits as in the core's cache, no block lost."""

from __future__ import annotations

from hashlib import blake2b
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache import EVICTIONS, PrefixCache, make_eviction
from kvist.model import pack
from kvist.plugins import EVICTION, SEED, chosen_eviction
from kvist.plugins.vllm.tree import BlockTree, Cached, entries

ONLINE = sorted(set(EVICTIONS) - {"belady"})
BLOCK = 4


class Pool:
    """Numbered blocks, as plain as can be."""

    def __init__(self, blocks: int, policy: str) -> None:
        self.tree = BlockTree(blocks, BLOCK, make_eviction(policy, rng=Random(3)))
        self.blank = list(range(blocks))
        self.known: dict[bytes, Cached] = {}

    def serve(self, hashes: list[bytes]) -> int:
        """One request from start to end; the blocks it hit."""
        tree, hits = self.tree, []
        for name in hashes:
            cached = self.known.get(name)
            if cached is None or cached.node is None:
                break
            hits.append(cached)
        tree.start(tree.path(hashes[: len(hits)]))
        mine = [cached.block for cached in hits]
        tree.use(hits)
        need = len(hashes) - len(hits)
        self.blank += tree.victims(need - len(self.blank)) if need > len(self.blank) else []
        fresh, self.blank = self.blank[:need], self.blank[need:]
        assert len(fresh) == need
        if need:
            found, spare = tree.store(hits[-1] if hits else None, tree.path(hashes[len(hits) :]))
            assert len(found) == need and not spare
            self.known.update(zip(hashes[len(hits) :], found, strict=True))
            hits, mine = hits + found, mine + fresh
        tree.touch(reversed(hits))
        assert tree.rest(list(zip(hits, mine, strict=True))[::-1]) == []
        return len(hashes) - need

    def check(self, blocks: int) -> None:
        held, stack = list(self.blank), list(self.tree.tree.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            assert all(cached.node is node and not cached.copies for cached in entries(node))
            held += [cached.block for cached in entries(node)]
        assert sorted(held) == list(range(blocks)) and self.tree.tree.locked == 0


def chain(prompt: list[int]) -> list[bytes]:
    hashes, above = [], b""
    for block in prompt:
        above = blake2b(above + bytes([block]), digest_size=32).digest()
        hashes.append(above)
    return hashes


@pytest.mark.parametrize("policy", ONLINE)
@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=40),
    blocks=st.integers(8, 20),
)
def test_hits_are_those_of_the_core(policy: str, prompts: list[list[int]], blocks: int) -> None:
    pool = Pool(blocks, policy)
    core = PrefixCache(blocks * BLOCK, make_eviction(policy, rng=Random(3)), block_size=BLOCK)
    now = 0
    for prompt in prompts:
        tokens = pack(
            [(10 * number + at) * BLOCK + i for at, number in enumerate(prompt) for i in range(BLOCK)]
        )
        now += 1
        match = core.match(tokens, now)
        core.lock(match.node)
        assert pool.serve(chain(prompt)) * BLOCK == match.length
        need = len(prompt) - match.length // BLOCK
        assert core.reserve(need)
        now += need > 0
        node = core.insert(tokens, now, below=match).node if need else match.node
        core.lock(node)
        core.unlock(match.node)
        now += 1
        core.insert(tokens, now)
        core.unlock(node)
        pool.check(blocks)
        assert pool.tree.evicted_blocks == core.evicted_blocks


def test_the_environment_chooses_the_policy() -> None:
    assert chosen_eviction({}) is None and chosen_eviction({EVICTION: " "}) is None
    policy = chosen_eviction({EVICTION: "slru, protect_after=3", SEED: "7"})
    assert policy is not None and policy.name == "slru" and policy.protect_after == 3  # type: ignore[attr-defined]
    for environ, words in (
        ({EVICTION: "belady"}, "KVIST_EVICTION=belady: unknown policy 'belady': choose one of"),
        ({EVICTION: "slru,protect_after"}, "'protect_after' is no parameter: write name=value"),
        ({EVICTION: "slru,protect_after=x"}, "parameter 'protect_after' must be a number, not 'x'"),
        ({EVICTION: "slru,depth=3"}, "KVIST_EVICTION=slru,depth=3: eviction policy slru"),
        ({EVICTION: "rlt", SEED: "x"}, "KVIST_EVICTION_SEED=x: must be a whole number"),
    ):
        with pytest.raises(ValueError) as error:
            chosen_eviction(environ)
        assert words in str(error.value)
