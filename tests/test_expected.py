"""What counts before the engines' word: against an engine that serves in order and is heard late."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query, pack
from kvist.prefix.events import EventIndex

SIZE = 4
GO = 9  # ends every prompt: an answer comes behind it, and nothing else


class Slow:
    """An engine with room for all: serves in order, answers a prompt always alike, and is heard of later."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: set[tuple[int, ...]] = set()
        self.queue: deque[tuple[Query, tuple[int, ...], int | None]] = deque()
        self.unheard: deque[list[tuple[int, ...]]] = deque()

    def whole(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [tokens[:end] for end in range(self.size, len(tokens) + 1, self.size)]

    def cached(self, tokens: tuple[int, ...]) -> int:
        """All whole blocks that are held, but never the last token."""
        found = 0
        for prefix in self.whole(tokens[:-1]):
            if prefix not in self.held:
                break
            found = len(prefix)
        return found

    def longest(self, tokens: tuple[int, ...]) -> int:
        return next((len(prefix) for prefix in reversed(self.whole(tokens)) if prefix in self.held), 0)

    def compute(self, tokens: tuple[int, ...]) -> None:
        new = [prefix for prefix in self.whole(tokens) if prefix not in self.held]
        self.held.update(new)
        if new:
            self.unheard.append(new)

    def tell(self, index: EventIndex, slot: int) -> None:
        new = self.unheard.popleft()
        first = new[0][: -self.size]
        tokens = pack(new[-1][len(first) :])
        index.stored(
            slot, [hash(prefix) for prefix in new], hash(first) if first else None, tokens, self.size
        )


def answer(tokens: tuple[int, ...], slot: int) -> tuple[int, ...]:
    """Up to three blocks of it, of other tokens at every worker."""
    rng = Random(hash((tokens, slot)))
    return tuple(rng.randrange(4) for _ in range(rng.randrange(1, 12)))


def believed(index: EventIndex, query: Query, slot: int, size: int) -> int:
    found = index.match(query, 2, 0.0)[slot]
    return found - size if found >= query.length else found  # as `BelievedIndex`: the last token is computed


ops = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "next", "next", "serve", "serve", "hear", "leave"]), st.integers(0, 99)
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(ops, st.integers(1, 5))
def test_it_is_what_the_engine_finds_when_the_prompts_turn_has_come(ops: list[Any], size: int) -> None:
    """However late its events are, once they have begun; nothing is evicted."""
    index = EventIndex(expect=1000)
    engines = [Slow(size), Slow(size)]
    talks: list[tuple[int, tuple[int, ...]]] = []  # slot, prompt and answer
    for slot, engine in enumerate(engines):
        index.add_worker(slot, 0)
        engine.compute((7,) * size)
        engine.tell(index, slot)
    for number, (op, draw) in enumerate(ops):
        rng = Random(draw // 2)
        slot = draw % 2
        engine = engines[slot]
        if op == "ask" or (op == "next" and not talks):
            tokens = (*(rng.randrange(2) for _ in range(rng.randrange(12))), GO)
        elif op == "next":
            slot, past = talks[draw % len(talks)]
            engine = engines[slot]
            tokens = (*past, *(rng.randrange(2) for _ in range(rng.randrange(6))), GO)
        elif op == "serve" and engine.queue:
            query, tokens, told = engine.queue.popleft()
            assert told in (None, engine.cached(tokens)), (tokens, engine.held)
            said = answer(tokens, slot)
            engine.compute(tokens)
            engine.compute(tokens + said[:-1])
            talks.append((slot, tokens + said))
            index.answered(query, slot, 0, 0, len(said), 0.0)
            continue
        elif op == "leave" and engine.queue:
            index.dropped(engine.queue.popleft()[0], slot)
            engine.queue = deque((*entry[:2], None) for entry in engine.queue)  # they counted on it
            continue
        else:
            if engine.unheard:
                engine.tell(index, slot)
            continue
        query = Query(number, pack(tokens))
        engine.queue.append((query, tokens, believed(index, query, slot, size)))
        index.routed(query, slot, 0.0)
    for slot, engine in enumerate(engines):
        while engine.unheard:
            engine.tell(index, slot)
        for query, _, _ in engine.queue:
            index.dropped(query, slot)
        for where, tokens in talks:
            found, held = index.match(Query(0, pack(tokens)), 2, 0.0)[slot], engine.longest(tokens)
            # The same prompt, answered again with nothing new to tell, may stand before another's answer.
            assert found == held if where == slot else found >= held
    for _, tokens in talks:
        assert index.match(Query(0, pack(tokens)), 2, 10.0) == [engine.longest(tokens) for engine in engines]
    index.match(Query(0, b""), 2, 10.0)
    expected = index.expected
    assert not expected.masks and not expected.tips and not expected._fading
    assert not any(expected._sent.values()) and not any(expected._by_key.values())
    assert expected.expired == 0 or any(engine.queue for engine in engines)


def prompt(*tokens: int) -> Query:
    return Query(0, pack([token for token in tokens for _ in range(SIZE)]))


def made(expect: int = 100, first: bool = True) -> EventIndex:
    index = EventIndex(expect=expect, grace=2.0)
    index.add_worker(0, 0)
    if first:
        index.stored(0, [0], None, pack([50] * SIZE), SIZE)
    return index


def test_it_lasts_until_some_time_after_the_answer() -> None:
    index, query = made(), prompt(1, 2)
    index.routed(query, 0, 0.0)
    assert index.match(query, 1, 1000.0) == [8], "however long the queue is"
    index.answered(query, 0, 0, 0, 1, 1000.0)
    assert index.match(query, 1, 1001.9) == [8]
    assert index.match(query, 1, 1002.0) == [0], "the engine keeps no prefixes, or counts tokens otherwise"
    assert (index.expected.confirmed, index.expected.expired) == (0, 2)


def test_the_engines_word_is_the_last() -> None:
    index, query = made(), prompt(1, 2)
    index.routed(query, 0, 0.0)
    index.stored(0, [1], None, pack([1] * SIZE), SIZE)
    index.removed(0, [1])
    assert index.match(query, 1, 0.0) == [0], "stored and evicted again"
    assert index.expected.confirmed == 1
    for other in (prompt(3), prompt(4)):
        index.routed(other, 0, 0.0)
    index.dropped(other, 0)
    assert index.match(prompt(3), 1, 0.0) == [4] and index.match(prompt(4), 1, 0.0) == [0]
    index.cleared(0)
    assert index.match(prompt(3), 1, 0.0) == [0]
    index.remove_worker(0)


def test_those_that_came_before_the_first_word_count_with_it() -> None:
    """Until then the size of a block is not known."""
    index, first, second = made(first=False), prompt(1, 1), prompt(2, 2)
    for query in (first, second):
        index.routed(query, 0, 0.0)
        index.answered(query, 0, 0, 0, 0, 0.0)
    assert index.match(second, 1, 0.0) == [0]
    index.stored(0, [1, 2], None, pack([1] * 2 * SIZE), SIZE)
    assert index.match(second, 1, 0.0) == [8] and index.match(second, 1, 2.0) == [0]
    assert index.match(first, 1, 2.0) == [8]


def test_a_workers_newest_prompts_count() -> None:
    index = made(expect=2)
    for token in (1, 2, 3):
        index.routed(prompt(token), 0, 0.0)
    assert [index.match(prompt(token), 1, 0.0)[0] for token in (1, 2, 3)] == [0, 4, 4]


@pytest.mark.parametrize("told", [0, 1, 2])
def test_an_answer_that_the_client_changed_is_believed_no_further_than_the_engines_word(told: int) -> None:
    """Three blocks long; of each block that the engine has told of it is known what it is."""
    index, query = made(), prompt(1)
    index.routed(query, 0, 0.0)
    for block in range(told + 1):
        parent = block if block else None
        index.stored(0, [block + 1], parent, pack([1 if not block else 20 + block] * SIZE), SIZE)
    index.answered(query, 0, 0, 0, 3 * SIZE + 1, 0.0)
    assert index.match(prompt(1, 21, 22, 23, 5), 1, 0.0) == [16]
    changed = index.match(prompt(1, 30, 30, 30, 5), 1, 0.0)
    assert changed == [16 if told == 0 else 4]


def test_without_a_count_of_the_answer_only_the_prompt_counts() -> None:
    index, query = made(), prompt(1)
    index.routed(query, 0, 0.0)
    index.answered(query, 0, 0, None, 0, 0.0)
    assert index.match(prompt(1, 2, 3), 1, 0.0) == [4]


def test_nothing_is_expected_where_nobody_asked_for_it() -> None:
    index, query = made(expect=0), prompt(1)
    index.routed(query, 0, 0.0)
    index.answered(query, 0, 0, 0, 9, 0.0)
    assert index.match(query, 1, 0.0) == [0]


def both() -> tuple[EventIndex, Query]:
    """Two workers that answered the same prompt, and told of the prompt alone."""
    index, query = made(), prompt(1)
    index.add_worker(1, 0)
    for slot in (0, 1):
        index.stored(slot, [1], None, pack([1] * SIZE), SIZE)
        index.routed(query, slot, 0.0)
        index.answered(query, slot, 0, 0, SIZE + 1, 0.0)
    return index, query


def test_workers_answers_are_their_own() -> None:
    index, _ = both()
    assert index.match(prompt(1, 8, 9), 2, 0.0) == [8, 8], "which of the two it was is not known"
    index.stored(0, [2], 1, pack([7] * SIZE), SIZE)
    assert index.match(prompt(1, 8, 9), 2, 0.0) == [4, 8] and index.match(prompt(1, 7, 9), 2, 0.0) == [8, 8]
    index.stored(1, [2], 1, pack([8] * SIZE), SIZE)
    assert index.match(prompt(1, 8, 9), 2, 0.0) == [4, 8] and index.match(prompt(1, 7, 9), 2, 0.0) == [8, 4]


def test_an_answer_goes_with_its_prompt() -> None:
    index, _ = both()
    index.removed(1, [1])
    assert index.match(prompt(1, 8, 9), 2, 0.0) == [8, 0]


def test_another_prompts_blocks_are_not_the_answer() -> None:
    """It shares all whole blocks, and goes on otherwise."""
    index, query = made(), Query(0, pack([1] * SIZE + [2]))
    index.routed(query, 0, 0.0)
    index.stored(0, [1, 2], None, pack([1] * SIZE + [3] * SIZE), SIZE)
    index.answered(query, 0, 0, 0, SIZE, 0.0)
    assert index.match(Query(1, pack([1] * SIZE + [2, 7, 7, 7, 9])), 1, 0.0) == [8]
    assert index.match(Query(1, pack([1] * SIZE + [4, 7, 7, 7, 9])), 1, 0.0) == [4]


def test_what_came_and_went_is_brought_again_by_who_comes_later() -> None:
    index, first, second = made(), prompt(1), prompt(1)
    index.routed(first, 0, 0.0)
    index.stored(0, [1], None, pack([1] * SIZE), SIZE)
    index.removed(0, [1])
    index.routed(second, 0, 0.0)
    index.dropped(first, 0)
    assert index.match(second, 1, 0.0) == [4]
    index.dropped(second, 0)
    assert index.match(second, 1, 0.0) == [0]
