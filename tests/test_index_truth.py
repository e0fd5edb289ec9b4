"""The engine's own count of cached tokens corrects the index, and only where it says something."""

from __future__ import annotations

from kvist.model import Query, pack
from kvist.prefix.index import CORRECTION_SLACK, PrefixIndex


def query(*parts: range) -> Query:
    return Query(0, pack([token for part in parts for token in part]))


SHARED, OTHER, OWN = range(1000), range(5000, 6000), range(9000, 9400)


def index_with(*queries: Query) -> PrefixIndex:
    index = PrefixIndex()
    index.add_worker(0, 0)
    for item in queries:
        index.routed(item, 0)
    return index


def test_what_an_engine_lost_is_forgotten_with_all_that_extends_it() -> None:
    lost, served = query(SHARED, OTHER), query(SHARED, OWN)
    index = index_with(lost, served)
    index.answered(served, 0, expected=1000, cached=0)
    assert index.match(lost, 1) == [1000], "what the served prompt has in common was cached again"
    assert index.match(served, 1) == [1400]


def test_a_shortfall_of_a_block_says_nothing() -> None:
    kept, served = query(SHARED, OTHER), query(SHARED, OWN)
    index = index_with(kept, served)
    index.answered(served, 0, expected=1000, cached=1000 - CORRECTION_SLACK)
    assert index.match(kept, 1) == [2000]


def test_a_short_common_front_does_not_wipe_out_everybody() -> None:
    """Every prompt starts with the same few tokens, too few for an engine's block."""
    first = query(range(10), range(1000, 2000))
    others = [query(range(10), range(10_000 * i, 10_000 * i + 500)) for i in range(1, 5)]
    index = index_with(*others, first)
    index.answered(first, 0, expected=10, cached=0)
    assert all(index.match(other, 1) == [510] for other in others)


def test_what_was_routed_meanwhile_stays() -> None:
    """A first request of a group misses, rightly expected; a second one was routed before its answer."""
    first, second = query(SHARED, OWN), query(SHARED, OTHER)
    index = index_with(first, second)
    index.answered(first, 0, expected=0, cached=0)
    assert index.match(second, 1) == [2000]


def test_no_count_changes_nothing() -> None:
    kept, served = query(SHARED, OTHER), query(SHARED, OWN)
    index = index_with(kept, served)
    index.answered(served, 0, expected=1000, cached=None)
    assert index.match(kept, 1) == [2000]
