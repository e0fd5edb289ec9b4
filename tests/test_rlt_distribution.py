"""RLT's batched draws have the distribution of its definition, one uniformly random leaf block at a time."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from oracle import PrefixSet
from scipy.stats import chi2_contingency
from test_cache_property import Blocks, cached_prefixes, prompt_of

from kvist.cache import PrefixCache, make_eviction, sampler

# A tree with forks at several depths; the last prompts are served in a later phase than the first ones.
OLD: list[Blocks] = [(0, 0, 0), (0, 1), (1, 0, 0, 0), (1, 0, 1), (2,), (0, 0, 1), (3, 0, 0), (3, 1)]
NEW: list[Blocks] = [(1, 0, 1, 2), (2, 2), (3, 1, 0, 0), (4, 0, 0)]
TRIALS = 1500


def reference(policy: str, evict: int, rng: Random) -> frozenset[Blocks]:
    """The definition: marks on tokens, one victim at a time, marks cleared when none is unmarked."""
    cache = PrefixSet()
    for blocks in OLD + NEW:
        cache.insert(blocks)
    marked = {blocks[:i] for blocks in NEW for i in range(1, len(blocks) + 1)}
    for _ in range(evict):
        leaves = cache.leaves()
        choice = sorted(leaves - marked) if policy == "rlt" else sorted(leaves)
        if not choice:
            marked = set()
            choice = sorted(leaves)
        cache.evict(rng.choice(choice))
    return frozenset(cache.prefixes)


def ours(policy: str, evict: int, seed: int, block_size: int) -> frozenset[Blocks]:
    cache = PrefixCache(100 * block_size, make_eviction(policy, rng=Random(seed)), block_size=block_size)
    for now, blocks in enumerate(OLD):
        cache.serve(prompt_of(blocks, block_size), now)
    if policy == "rlt":
        cache.eviction._begin_phase()  # type: ignore[attr-defined]  # clears the marks of OLD
        cache.eviction._serving.clear()  # type: ignore[attr-defined]
        cache.eviction._begin_phase()  # type: ignore[attr-defined]
    for now, blocks in enumerate(NEW):
        cache.serve(prompt_of(blocks, block_size), 10 + now)
    cache.eviction.begin(None, 20)
    assert cache.evict(evict) == evict
    return frozenset(cached_prefixes(cache))


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("few", [0, 1000], ids=["batched", "one by one"])
@pytest.mark.parametrize(("policy", "evict"), [("rlt", 3), ("rlt", 5), ("rlt", 13), ("random-leaf", 4)])
def test_same_distribution_as_the_definition(
    policy: str, evict: int, few: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "_SCALAR_DRAWS", few)
    rng = Random(11)
    expected = Counter(reference(policy, evict, rng) for _ in range(TRIALS))
    found = Counter(ours(policy, evict, seed, block_size) for seed in range(TRIALS))
    states = sorted(expected | found, key=lambda state: -(expected + found)[state])
    common = [state for state in states if (expected + found)[state] >= 20]
    table = [[counts[state] for state in common] for counts in (expected, found)]
    for row, counts in zip(table, (expected, found), strict=True):
        row.append(TRIALS - sum(counts[state] for state in common) + 1)
    assert len(common) > 5, "the test must tell many outcomes apart"
    assert chi2_contingency(table).pvalue > 1e-3


def test_a_wrong_distribution_would_be_noticed() -> None:
    """The same comparison rejects unmarked random draws passed off as RLT."""
    rng = Random(11)
    expected = Counter(reference("rlt", 3, rng) for _ in range(TRIALS))
    found = Counter(ours("random-leaf", 3, seed, 1) for seed in range(TRIALS))
    states = [s for s in expected | found if (expected + found)[s] >= 20]
    assert chi2_contingency([[c[s] + 1 for s in states] for c in (expected, found)]).pvalue < 1e-9
