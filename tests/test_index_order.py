"""The router's index forgets leaves before their parents, also after splits that other workers cause."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query, pack
from kvist.prefix.index import PrefixIndex
from kvist.prefix.tree import Node


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_a_worker_s_order_has_children_before_parents(seed: int) -> None:
    rng = Random(seed)
    index = PrefixIndex()
    for slot in range(3):
        index.add_worker(slot, 40)
    for number in range(60):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 15))]
        index.routed(Query(number, pack(tokens)), rng.randrange(3))
        for slot in range(3):
            seen: set[Node] = set()
            for node in index._lru[slot]:
                seen.add(node)
                assert all(child in seen for child in node.children.values() if child.state >> slot & 1)
