"""Both indices against a set of prefixes for each worker."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_property import Blocks, prompt_of

from kvist.model import Query
from kvist.prefix.events import EventIndex
from kvist.prefix.hashing import block_keys
from kvist.prefix.index import PrefixIndex

WORKERS = 3
prompts = st.lists(st.integers(0, 2), max_size=7).map(tuple)


def query(blocks: Blocks, block_size: int = 1, salt: bytes = b"") -> Query:
    return Query(0, prompt_of(blocks, block_size), salt=salt)


def longest(held: set[tuple[bytes, Blocks]], blocks: Blocks, salt: bytes) -> int:
    hit = 0
    while hit < len(blocks) and (salt, blocks[: hit + 1]) in held:
        hit += 1
    return hit


@settings(max_examples=200, deadline=None)
@given(
    ops=st.lists(
        st.tuples(
            st.sampled_from(["route", "route", "route", "match", "leave"]),
            prompts,
            st.integers(0, WORKERS - 1),
            st.sampled_from([b"", b"s"]),
        ),
        max_size=40,
    ),
    block_size=st.sampled_from([1, 3]),
)
def test_own_index_knows_who_was_sent_what(
    ops: list[tuple[str, Blocks, int, bytes]], block_size: int
) -> None:
    index = PrefixIndex(block_size=block_size)
    held: list[set[tuple[bytes, Blocks]]] = [set() for _ in range(WORKERS)]
    for slot in range(WORKERS):
        index.add_worker(slot, 0)
    for op, blocks, slot, salt in ops:
        q = query(blocks, block_size, salt)
        if op == "route":
            index.routed(q, slot)
            held[slot].update((salt, blocks[:i]) for i in range(1, len(blocks) + 1))
        elif op == "leave":
            index.remove_worker(slot)
            index.add_worker(slot, 0)
            held[slot].clear()
        expected = [longest(own, blocks, salt) * block_size for own in held]
        assert index.match(q, WORKERS) == expected
        for worker, own in enumerate(held):
            assert index.cached_tokens(worker) == len(own) * block_size
    everything = set().union(*held)
    assert index.tree.total == len(everything), "what nobody holds is freed, what many hold is kept once"


@settings(max_examples=150, deadline=None)
@given(
    routed=st.lists(st.tuples(prompts, st.integers(0, 1)), max_size=40),
    budgets=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_own_index_stays_within_each_workers_budget(
    routed: list[tuple[Blocks, int]], budgets: tuple[int, int]
) -> None:
    """Whatever is dropped, what is left is prefix-closed, within budget, and the last prompt if it fits."""
    index = PrefixIndex()
    for slot, budget in enumerate(budgets):
        index.add_worker(slot, budget)
    sent: list[set[tuple[bytes, Blocks]]] = [set(), set()]
    for blocks, slot in routed:
        q = query(blocks)
        index.routed(q, slot)
        sent[slot].update((b"", blocks[:i]) for i in range(1, len(blocks) + 1))
        assert index.cached_tokens(slot) <= budgets[slot]
        found = index.match(q, 2)
        assert all(hit <= longest(own, blocks, b"") for hit, own in zip(found, sent, strict=True))
        if len(blocks) <= budgets[slot]:
            assert found[slot] == len(blocks)
    assert index.tree.total <= sum(budgets)


@settings(max_examples=200, deadline=None)
@given(
    ops=st.lists(
        st.tuples(
            st.sampled_from(["store", "store", "store", "remove", "clear", "leave"]),
            prompts,
            st.integers(0, WORKERS - 1),
        ),
        max_size=40,
    )
)
def test_event_index_mirrors_what_engines_say(ops: list[tuple[str, Blocks, int]]) -> None:
    """Engine hashes are opaque names, here different ones for each worker."""
    size = 2
    index = EventIndex()
    held: list[set[Blocks]] = [set() for _ in range(WORKERS)]
    for slot in range(WORKERS):
        index.add_worker(slot, 0)

    def name(slot: int, blocks: Blocks) -> object:
        return (slot, blocks) if slot else hash(blocks) & 0xFFFF_FFFF_FFFF_FFFF

    for op, blocks, slot in ops:
        own = held[slot]
        if op == "store":
            known = longest({(b"", b) for b in own}, blocks, b"")
            new = blocks[known:]
            if new:
                names = [name(slot, blocks[: known + i + 1]) for i in range(len(new))]
                parent = name(slot, blocks[:known]) if known else None
                index.stored(slot, names, parent, prompt_of(new, size), size)  # type: ignore[arg-type]
                own.update(blocks[: known + i + 1] for i in range(len(new)))
        elif op == "remove":
            leaves = [b for b in sorted(own) if not any(o[: len(b)] == b and o != b for o in own)]
            for leaf in leaves[: len(blocks)]:
                index.removed(slot, [name(slot, leaf)])  # type: ignore[list-item]
                own.discard(leaf)
        elif op == "clear":
            index.cleared(slot)
            own.clear()
        else:
            index.remove_worker(slot)
            index.add_worker(slot, 0)
            own.clear()
        expected = [longest({(b"", b) for b in worker}, blocks, b"") * size for worker in held]
        assert index.match(query(blocks, size), WORKERS) == expected
    assert index.unknown_parents == 0


def test_event_index_drops_blocks_whose_parent_it_never_saw() -> None:
    index = EventIndex()
    index.add_worker(0, 0)
    index.stored(0, ["b"], "a", prompt_of((1,), 2), 2)
    assert index.unknown_parents == 1
    assert index.match(query((1,), 2), 1) == [0]


def test_event_index_counts_copies_under_several_names() -> None:
    """An engine may hold a block twice under two hashes; one removal leaves the other."""
    index = EventIndex()
    index.add_worker(0, 0)
    for copy in ("x", "y", "z"):
        index.stored(0, [copy], None, prompt_of((1,), 2), 2)
    index.removed(0, ["x", "y"])
    assert index.match(query((1,), 2), 1) == [2]
    index.removed(0, ["z", "never"])
    assert index.match(query((1,), 2), 1) == [0]


def test_block_keys_chain_and_keep_salts_apart() -> None:
    prompt = prompt_of((1, 2, 1, 2), 2)
    keys = block_keys(prompt, 8)
    assert len(set(keys)) == 4, "equal blocks at different places have different keys"
    assert block_keys(prompt[16:], 8, parent=keys[1]) == keys[2:]
    assert not set(keys) & set(block_keys(prompt, 8, b"tenant"))
    assert block_keys(prompt[:-1], 8) == keys[:3], "a block that is not full has no key"
