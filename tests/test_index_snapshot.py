"""The index across a restart: it goes on as if nothing had happened, for the workers that are there again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.gateway import snapshot
from kvist.model import Query, WorkerState, pack
from kvist.prefix.index import PrefixIndex

SIZE = 2
WORKERS = 3
blocks = st.lists(st.integers(1, 2), min_size=1, max_size=5).map(tuple)
routes = st.lists(st.tuples(blocks, st.integers(0, WORKERS - 1), st.sampled_from([b"", b"s"])), max_size=25)


def query(path: tuple[int, ...], salt: bytes) -> Query:
    return Query(0, pack([token for token in path for _ in range(SIZE)]), salt=salt)


def make() -> PrefixIndex:
    index = PrefixIndex(block_size=SIZE, budget=7 * SIZE)
    for slot in range(WORKERS):
        index.add_worker(slot, 0)
    return index


@settings(max_examples=300, deadline=None)
@given(routes, routes, st.permutations(range(WORKERS)), st.integers(0, WORKERS))
def test_a_restored_index_goes_on_as_before(
    before: list[Any], after: list[Any], moved: list[int], left: int
) -> None:
    """Slots are dealt anew, and one worker may be gone."""
    old, new = make(), make()
    for path, slot, salt in before:
        old.routed(query(path, salt), slot)
    wire = msgspec.msgpack.encode(old.snapshot({slot: f"worker{slot}" for slot in range(WORKERS)}))
    here = {f"worker{slot}": moved[slot] for slot in range(WORKERS) if slot != left}
    new.restore(msgspec.msgpack.decode(wire), here)

    def same(path: tuple[int, ...], salt: bytes) -> None:
        was, now = old.match(query(path, salt), WORKERS), new.match(query(path, salt), WORKERS)
        for slot in range(WORKERS):
            assert now[moved[slot]] == (0 if slot == left else was[slot])

    for path, _, salt in before:
        same(path, salt)
    for path, slot, salt in after if left == WORKERS else ():  # else edges are cut elsewhere, and evicted so
        old.routed(query(path, salt), slot)
        new.routed(query(path, salt), moved[slot])
        same(path, salt)
    for slot in range(WORKERS):
        if slot != left:
            assert new.cached_tokens(moved[slot]) == old.cached_tokens(slot)
        new.remove_worker(moved[slot])
    assert new.tree.total == 0, "nothing is left behind"


def test_what_does_not_fit_is_refused(tmp_path: Any) -> None:
    path, workers = tmp_path / "learned", [WorkerState("a", slot=0)]
    index = make()
    assert not snapshot.load_index(index, workers, path), "none yet"
    index.routed(query((1, 2), b""), 0)
    snapshot.save_index(index, workers, path)
    assert [file.name for file in tmp_path.iterdir()] == ["learned.index"]
    with pytest.raises(ValueError, match="made for blocks of 8 bytes, not 16"):
        snapshot.load_index(PrefixIndex(block_size=4), workers, path)
    good = {"version": 1, **index.snapshot({0: "a"})}
    for broken in (
        b"",
        b"\xc1",
        msgspec.msgpack.encode({**good, "version": 9}),
        msgspec.msgpack.encode({**good, "held": {"a": [5]}}),
        msgspec.msgpack.encode({**good, "nodes": [[-1, b"", b"odd"]]}),
        msgspec.msgpack.encode({**good, "nodes": [[7, b"", b"x" * 8]]}),
        msgspec.msgpack.encode({"version": 1}),
    ):
        snapshot.index_file(path).write_bytes(broken)
        with pytest.raises(ValueError, match=r"learned\.index: .*delete it"):
            snapshot.load_index(make(), workers, path)
