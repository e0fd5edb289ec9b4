"""KV events: both wire forms against what was encoded, and feeds against a model that saw every batch."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.gateway.knowledge.believed import BelievedIndex
from kvist.gateway.knowledge.feed import Feed, State
from kvist.gateway.knowledge.subscriber import endpoint
from kvist.gateway.knowledge.wire import AllCleared, BadEvents, BlocksRemoved, BlocksStored, decode
from kvist.gateway.prompt import engine_salt
from kvist.model import Query, pack
from kvist.prefix.events import EventIndex
from kvist.prefix.index import PrefixIndex

SIZE = 4
ORDER = {  # of the array form
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id"),
        *("medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}


def encode(*events: dict[str, Any], form: str = "map", moment: float = 1.0) -> bytes:
    """A batch in the current form (maps) or the older one (arrays)."""
    if form == "map":
        return msgspec.msgpack.encode({"ts": moment, "events": list(events), "unheard_of": 1})
    rows = [[event["type"], *(event.get(name) for name in ORDER[event["type"]])] for event in events]
    return msgspec.msgpack.encode([moment, rows, 0])


def stored(hashes: list[Any], tokens: list[int], parent: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": SIZE,
        **more,
    }


def removed(*hashes: Any, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), **more}


CLEARED = {"type": "AllBlocksCleared"}


@pytest.mark.parametrize("form", ["map", "array"])
def test_both_forms_say_the_same(form: str) -> None:
    batch = encode(
        stored([1, b"\xff" * 32], [1, 2, 3, 4, 5, 6, 7, 8], medium="GPU"),
        stored([3], [9, 9, 9, 9], parent=-5, medium="CPU"),
        stored([3], [9, 9, 9, 9], parent=-5, lora_id=7, lora_name="ada"),
        stored([4], [9, 9, 9, 9], lora_id=7),
        stored([5], [9, 9, 9, 9], group_idx=1, kv_cache_spec_kind="sliding_window"),
        removed(1, medium="GPU"),
        removed(2, medium="CPU_PINNED"),
        removed(b"\x00", group_idx=2),
        CLEARED,
        form=form,
    )
    assert decode(batch) == (
        1.0,
        [
            BlocksStored([1, b"\xff" * 32], None, pack(range(1, 9)), SIZE),
            BlocksStored([3], -5, pack([9] * 4), SIZE, engine_salt("ada", "")),
            BlocksStored([4], None, pack([9] * 4), SIZE, engine_salt("#7", "")),
            BlocksRemoved([1]),
            BlocksRemoved([b"\x00"], 2),
            AllCleared(),
        ],
    )


def test_the_oldest_short_form_and_unknown_kinds() -> None:
    rows = [["BlockStored", [1], None, [1, 2, 3, 4], 4, None], ["BlockRemoved", [1]], ["Unheard", 1, 2]]
    assert decode(msgspec.msgpack.encode([2.5, rows])) == (
        2.5,
        [BlocksStored([1], None, pack([1, 2, 3, 4]), 4), BlocksRemoved([1])],
    )


def test_salts_line_up_with_what_requests_ask_for() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    for more, lora, salt in (
        ({"extra_keys": [["s"], None]}, "", "s"),
        ({"extra_keys": [["ada", "s"], ["ada"]], "lora_name": "ada"}, "ada", "s"),
        ({"extra_keys": [["ada"], ["ada"]], "lora_name": "ada"}, "ada", ""),
        ({"cache_salt": "s"}, "", "s"),
        ({}, "", ""),
    ):
        index = EventIndex()
        index.add_worker(0, 0)
        (event,) = decode(encode(stored([1, 2], tokens, **more)))[1]
        assert isinstance(event, BlocksStored)
        index.stored(0, event.hashes, event.parent, event.tokens, event.block_size, event.salt)
        for asked in (("", ""), ("", "s"), ("ada", ""), ("ada", "s"), ("s", "ada")):
            found = index.match(Query(0, pack(tokens), salt=engine_salt(*asked)), 1)
            assert found == [8 if asked == (lora, salt) else 0], (more, asked)


def test_blocks_with_an_image_match_no_text() -> None:
    tokens = [1, 2, 3, 4, 5, 5, 5, 5]
    index = EventIndex()
    index.add_worker(0, 0)
    for keys in ([None, [["image-a", 0]]], [None, [["image-b", 0]]], [None, [b"embedding"]]):
        (event,) = decode(encode(stored([1, str(keys)], tokens, extra_keys=keys)))[1]
        assert isinstance(event, BlocksStored)
        index.stored(0, event.hashes, event.parent, event.tokens, event.block_size, event.salt)
    assert index.match(Query(0, pack(tokens)), 1) == [4], "the block before the image matches, no more"
    assert len(set(index.names(0))) == 4


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_payload_does_more_than_be_refused(payload: bytes) -> None:
    with suppress(BadEvents):
        decode(payload)


values = st.recursive(
    st.none()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(
            sorted({*stored([], []), "medium", "lora_name", "lora_id", "extra_keys", "group_idx"})
        ),
        values,
    ),
    st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared"]),
)
def test_no_event_breaks_a_feed(fields: dict[str, Any], kind: str) -> None:
    """Whatever the values, the feed goes on with the next batch."""
    index, feed = make()
    event = {**stored([1], [1, 2, 3, 4]), **fields, "type": kind}
    assert feed.offer(0, msgspec.msgpack.encode([1.0, [event]])) is None
    assert feed.offer(1, encode(CLEARED, stored([1], [1, 2, 3, 4]))) is None
    assert feed.state is State.EXACT
    assert index.match(Query(0, pack([1, 2, 3, 4, 5])), 1) == [4]


def replay(feed: Feed, start: int, batches: list[tuple[int, bytes]], number: int, payload: bytes) -> None:
    for _ in feed.replayed(start, batches, number, payload):
        assert feed.state is not State.EXACT or feed._complete, "not before the end"


def make(rank: int = 0) -> tuple[EventIndex, Feed]:
    index = EventIndex()
    index.add_worker(0, 0)
    return index, Feed(index, 0, rank, clock=lambda: 3.0)


class Engine:
    """A publisher with a cache of single-block prefixes and their children, two levels deep."""

    def __init__(self) -> None:
        self.held: set[tuple[int, ...]] = set()
        self.batches: list[bytes] = []
        self.kept = 1000

    def act(self, op: str, path: tuple[int, ...]) -> None:
        events = []
        if op == "store":
            for end in range(1, len(path) + 1):
                if path[:end] not in self.held:
                    self.held.add(path[:end])
                    parent = self.name(path[: end - 1]) if end > 1 else None
                    events.append(stored([self.name(path[:end])], [path[end - 1]] * SIZE, parent))
        elif op == "remove":
            gone = {held for held in self.held if held[: len(path)] == path}
            self.held -= gone
            events += [removed(self.name(held)) for held in sorted(gone, key=len, reverse=True)]
        else:
            self.held.clear()
            events.append(CLEARED)
        self.batches.append(encode(*events, form="array" if len(self.batches) % 2 else "map"))

    @staticmethod
    def name(path: tuple[int, ...]) -> int:
        return hash(("engine", path)) & 0xFFFF_FFFF

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        first = max(start, len(self.batches) - self.kept)
        return list(enumerate(self.batches))[first:]


paths = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)
steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "store", "remove", "clear"]),
        paths,
        st.sampled_from(["heard", "heard", "heard", "missed", "restart", "restart missed", "cut"]),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps, st.sampled_from([0, 2, 1000]), st.booleans())
def test_an_exact_feed_holds_what_the_engine_holds(ops: list[Any], kept: int, late: bool) -> None:
    """Batches are missed, engines restart, connections break; replays have all, some or nothing."""
    index, feed = make()
    engine = Engine()
    if late:
        engine.act("store", (1, 2))
    for op, path, fate in ops:
        if fate.startswith("restart"):
            engine = Engine()
            feed.lost()
        elif fate == "cut":
            feed.lost()
        engine.kept = kept
        engine.act(op, path)
        if fate.endswith("missed"):
            continue
        number = len(engine.batches) - 1
        start = feed.offer(number, engine.batches[number])
        if start is not None:
            replay(feed, start, engine.replay(start), number, engine.batches[number])
        assert feed.state is not State.SILENT
        for probe in ((1, 2, 3), (1, 1, 1), (2, 1), (3,), path):
            prompt = pack([token for token in probe for _ in range(SIZE)])
            found = index.match(Query(0, prompt), 1)[0]
            true = 0
            while true < len(probe) and probe[: true + 1] in engine.held:
                true += 1
            if feed.state is State.EXACT:
                assert found == true * SIZE, (probe, engine.held)
            else:
                assert found <= true * SIZE, "a part of the truth, and nothing that is not held"
        if kept == 1000:
            assert feed.state is State.EXACT, "a replay from the start makes it whole"


def test_live_batches_that_a_replay_brought_already_are_no_restart() -> None:
    index, feed = make()
    engine = Engine()
    for path in ((1,), (2,), (3,), (1, 1)):
        engine.act("store", path)
    assert feed.offer(1, engine.batches[1]) == 0
    replay(feed, 0, engine.replay(0), 1, engine.batches[1])
    for number in (2, 3):
        assert feed.offer(number, engine.batches[number]) is None
    assert feed.counts.restarts == 0 and feed.counts.batches == 4 and len(index.names(0)) == 4
    engine.act("store", (1, 1, 1))
    assert feed.offer(4, engine.batches[4]) is None
    assert len(index.names(0)) == 5
    assert feed.offer(2, engine.batches[2]) == 0, "now it is one"
    assert feed.counts.restarts == 1 and index.names(0) == []


def test_a_connection_that_breaks_amid_a_replay_is_believed_no_more() -> None:
    index, feed = make()
    engine = Engine()
    for path in ((1,), (2,), (3,)):
        engine.act("store", path)
    assert feed.offer(2, engine.batches[2]) == 0
    for number, _ in enumerate(feed.replayed(0, engine.replay(0), 2, engine.batches[2])):
        assert feed.state is (State.PARTIAL if number == 0 else State.SILENT)
        feed.lost()
    assert feed.state is State.SILENT
    engine.act("store", (1, 1))
    assert feed.offer(3, engine.batches[3]) == 0, "nothing of it is trusted any further"
    replay(feed, 0, engine.replay(0), 3, engine.batches[3])
    assert feed.state is State.EXACT and len(index.names(0)) == 4


def test_counts_say_what_went_wrong() -> None:
    _, feed = make()
    assert feed.offer(0, encode(stored([1], [1] * 4), moment=2.0)) is None
    assert feed.counts.lag == 1.0
    assert feed.offer(3, encode(stored([9], [1] * 4, parent=8))) == 1
    replay(feed, 1, [], 3, encode(stored([9], [1] * 4, parent=8)))
    assert feed.offer(4, b"\xc1") is None
    counts = feed.counts
    assert (counts.gaps, counts.replays, counts.resets, counts.unknown_parents) == (1, 0, 2, 1)
    assert (counts.invalid, counts.batches, counts.events, feed.state) == (1, 3, 2, State.PARTIAL)
    assert feed.offer(5, encode(CLEARED)) is None
    assert feed.state is State.EXACT, "an empty cache is known in full"


def test_ranks_of_a_worker_share_a_slot_but_not_a_fate() -> None:
    index, first = make()
    second = Feed(index, 0, 1, clock=lambda: 0.0)
    first.offer(0, encode(stored([1], [1] * 4), stored([2], [2] * 4)))
    second.offer(0, encode(stored([1], [1] * 4), stored([3], [3] * 4)))
    query = {token: Query(0, pack([token] * 4)) for token in (1, 2, 3)}
    second.offer(1, encode(CLEARED))
    assert [index.match(query[token], 1)[0] for token in (1, 2, 3)] == [4, 4, 0]
    first.offer(1, encode(removed(1)))
    assert [index.match(query[token], 1)[0] for token in (1, 2, 3)] == [0, 4, 0]


def test_belief_follows_the_state_of_the_events() -> None:
    own, events = PrefixIndex(block_size=SIZE), EventIndex(expect=4)
    feeds: dict[int, list[Feed]] = {}
    index = BelievedIndex(own, events, feeds)
    index.add_worker(0, 0)
    feed = Feed(events, 0, clock=lambda: 0.0, restarted=lambda: index.restarted(0))
    feeds[0] = [feed]
    query = Query(0, pack([1] * 4 + [2] * 4 + [9]))
    index.routed(query, 0)
    assert index.match(query, 1) == [8] and index.state(0) is State.SILENT, "the own index"
    feed.offer(0, encode(stored([1], [1] * 4)))
    assert index.match(query, 1) == [8] and index.state(0) is State.EXACT, "the rest is on its way"
    index.dropped(query, 0)
    assert index.match(query, 1) == [4], "the events alone"
    index.routed(query, 0)
    assert index.match(query, 1) == [8], "until the engine says otherwise"
    feed.offer(2, encode(stored([7], [7] * 4)))
    replay(feed, 1, [], 2, encode(stored([7], [7] * 4)))
    assert index.state(0) is State.PARTIAL and index.match(query, 1) == [8], "the longer of the two"
    assert index.match(Query(0, pack([7] * 4 + [1])), 1) == [4]
    feed.lost()
    assert index.state(0) is State.SILENT and index.match(Query(0, pack([7] * 4 + [1])), 1) == [0]
    feed.offer(0, encode(CLEARED))
    assert index.match(query, 1) == [0] and own.cached_tokens(0) == 0, "a new engine is empty"
    index.routed(Query(0, pack([1] * 4)), 0)
    index.remove_worker(0)


def test_addresses_are_made_of_the_workers_url() -> None:
    url = "http://10.0.0.1:8000"
    assert endpoint("5557", url) == "tcp://10.0.0.1:5557"
    assert endpoint("5557", url, 2) == "tcp://10.0.0.1:5559"
    assert endpoint("tcp://{host}:{port+1000}", url, 1) == "tcp://10.0.0.1:9001"
    assert endpoint("tcp://other:{port}", url) == "tcp://other:8000"
    assert endpoint("tcp://{host}:5557", "https://[::1]") == "tcp://[::1]:5557"
    assert endpoint("ipc:///tmp/kv", url) == "ipc:///tmp/kv"
    for wrong in ("", "udp://a:1", "tcp://*:5557", "tcp://{nohost}:1", "tcp://a", "tcp://{host}:{port-1}"):
        with pytest.raises(ValueError, match="no address to connect to"):
            endpoint(wrong, url)
