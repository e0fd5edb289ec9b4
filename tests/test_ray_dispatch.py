"""What the Ray Serve router decides and holds, without Ray: claims, ranks, prompts."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query
from kvist.plugins.ray_serve.dispatch import SPARE, Claim, Dispatcher, Unconfirmed
from kvist.plugins.ray_serve.prompt import openai_request, query_of
from kvist.prefix.index import PrefixIndex
from kvist.routing import ROUTERS, Router, Status, make_policy


def dispatcher(policy: str = "lbgr", replicas: int = 3) -> Dispatcher:
    found = Dispatcher(
        Router(
            make_policy(policy, rng=Random(1)), index=PrefixIndex(unit=1, block_size=16, units_per_token=4)
        )
    )
    found.update([f"r{i}" for i in range(replicas)], 0.0)
    return found


def claim(text: str, number: int = 0) -> Claim:
    return Claim(Query(number, text.encode(), unit=1))


def held(found: Dispatcher) -> dict[str, int]:
    return {worker.id: worker.in_flight for worker in found.router.workers}


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "ask", "again", "full", "place", "first", "ok", "fail", "cancel", "join", "die"]
        ),
        st.integers(0, 40),
        st.floats(0, 3),
    ),
    max_size=80,
)


@pytest.mark.parametrize("policy", sorted(ROUTERS))
@settings(max_examples=40, deadline=None)
@given(ops=steps)
def test_a_claim_holds_one_place_at_most_and_gives_it_back(
    policy: str, ops: list[tuple[str, int, float]]
) -> None:
    """Oracle: a plain map from request to the replica that it was last meant for."""
    found = dispatcher(policy)
    now, joined = 0.0, 3
    live: list[Claim] = []
    meant: dict[int, str] = {}  # id(claim) -> replica
    for op, number, wait in ops:
        now += wait
        names = list(held(found))
        one = live[number % len(live)] if live else None
        if op == "ask" or (one is not None and op in ("again", "full")):
            if op == "ask":
                one = claim("same prompt " * (number % 7) + str(number), number)
                live.append(one)
            assert one is not None
            free = set() if op == "full" else {name for i, name in enumerate(names) if (number >> i) % 2}
            ranks = found.rank(one, free, names, now)
            flat = [name for rank in ranks for name in rank]
            assert len(flat) == len(set(flat)) <= SPARE + 2
            meant.pop(id(one), None)
            if free:
                assert set(flat) <= free and len(ranks[0]) == 1
                meant[id(one)] = ranks[0][0]
            else:
                assert set(flat) <= set(names)
                loads = [held(found)[name] for name in flat]
                assert loads == sorted(loads)
        elif op == "join":
            joined += 1
            found.update([*names, f"r{joined}"], now)
        elif op == "die" and len(names) > 1:
            found.lost(names[number % len(names)], now)
            found.lost("never there", now)
        elif one is None:
            continue
        elif op == "place":
            target = names[number % len(names)]
            found.placed(one, target, now)
            meant[id(one)] = target
        elif op == "first":
            found.first_token(one, now)
        elif op in ("ok", "fail", "cancel"):
            status = {"ok": Status.OK, "fail": Status.FAILED}.get(op, Status.CANCELLED)
            outcome = found.ended(one, status, now)
            assert (outcome is not None) == (id(one) in meant)
            assert found.ended(one, status, now) is None
            found.placed(one, names[0], now)  # too late to matter
            live.remove(one)
            meant.pop(id(one), None)
        expected = dict.fromkeys(held(found), 0)
        for name in meant.values():
            if name in expected:
                expected[name] += 1
        assert held(found) == expected
    for one in live:
        found.ended(one, Status.CANCELLED, now)
    for worker in found.router.workers:
        assert worker.in_flight == worker.in_flight_tokens == worker.pending_prefill == 0
        assert worker.load == 0


def test_a_prefix_stays_where_it_is_while_the_load_is_even() -> None:
    found = dispatcher()
    homes: dict[str, str] = {}
    now = 0.0
    for turn in range(40):
        for group in ("a", "b", "c"):
            now += 0.05
            one = claim(group * 4000 + str(turn), turn)
            home = found.rank(one, set(held(found)), [], now)[0][0]
            found.placed(one, home, now)
            now += 0.02 if homes.get(group) == home else 0.4
            found.ended(one, Status.OK, now)
            if turn > 5:
                assert homes.setdefault(group, home) == home
            else:
                homes[group] = home
    assert len(set(homes.values())) > 1


def test_requests_chosen_in_one_moment_see_each_other() -> None:
    found = dispatcher(replicas=4)
    first = [found.rank(claim(f"{i} " * 500, i), set(held(found)), [], 1.0)[0][0] for i in range(40)]
    assert max(first.count(name) for name in held(found)) <= 11


def test_a_replica_that_refused_is_followed_by_the_next_best() -> None:
    found = dispatcher()
    warm = claim("p" * 2000)
    home = found.rank(warm, set(held(found)), [], 0.0)[0][0]
    found.placed(warm, home, 0.0)
    found.ended(warm, Status.OK, 0.1)
    one = claim("p" * 2000)
    assert found.rank(one, set(held(found)), [], 1.0)[0] == [home]
    others = set(held(found)) - {home}
    assert found.rank(one, others, [home], 1.1)[0][0] in others
    assert held(found)[home] == 0 and sum(held(found).values()) == 1


def test_openai_objects_mappings_and_texts_give_prompts() -> None:
    def text(asked: Any) -> bytes:
        query = query_of(1, asked)
        assert query is not None
        return query.prompt

    one = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    same = SimpleNamespace(model="m", messages=[SimpleNamespace(model_dump=lambda **_: one["messages"][0])])
    assert text(one) == text(same)
    more = {**one, "messages": [*one["messages"], {"role": "assistant", "content": "hello"}]}
    assert text(more).startswith(text(one))
    tools = {**one, "tools": [{"type": "function"}]}
    assert not text(tools).startswith(text(one)[:4])
    assert text({"prompt": "abc"}) == b'"abc'
    assert text({"prompt": [1, 2]}) == b"[1,2"
    assert text("abc") == text(b"abc") == b"abc"
    assert query_of(1, None) is None
    with pytest.raises(TypeError, match="must return text"):
        query_of(1, {"n": 3})


def test_models_and_salts_keep_prompts_apart() -> None:
    salts = {
        query.salt
        for body in ({"prompt": "p"}, {"prompt": "p", "cache_salt": "s"}, {"prompt": "p", "model": "x"})
        for lora in ("", "lora-1")
        if (query := query_of(1, body, lora)) is not None
    }
    assert len(salts) == 5  # the adapter's name stands in for the model's


def test_the_first_openai_request_among_the_arguments_is_taken() -> None:
    body = {"messages": []}
    assert openai_request((3, "text", body), {}) is body
    assert openai_request((), {"request": body}) is body
    assert openai_request(("text", [1]), {"n": 2}) is None


@given(
    ops=st.lists(
        st.tuples(st.sampled_from(["send", "accept", "retry", "end"]), st.integers(0, 5)), max_size=40
    )
)
def test_every_sending_ends_once_and_no_accepted_claim_is_ended_by_another(
    ops: list[tuple[str, int]],
) -> None:
    """Oracle: with one sending a key at a time, an end is the claim's own unless it was accepted or left."""
    found = Unconfirmed()
    sending: dict[int, tuple[Claim, bool]] = {}  # key -> claim, still unconfirmed
    for op, key in ops:
        if op == "send" and key not in sending:
            sending[key] = (claim("p"), True)
            found.sent(key, sending[key][0])
        elif key not in sending:
            continue
        elif op in ("accept", "retry"):
            one, _ = sending[key]
            found.settled(key, one)
            sending[key] = (one, False)
        elif op == "end":
            one, unconfirmed = sending.pop(key)
            assert found.completed(key) is (one if unconfirmed else None)
        assert len(found) == len(sending)


def test_an_end_under_a_shared_id_is_an_accepted_siblings_first() -> None:
    found, first, second = Unconfirmed(), claim("a"), claim("b")
    found.sent("id", first)
    found.sent("id", second)
    found.settled("id", first)
    assert found.completed("id") is None
    assert found.completed("id") is second
    assert found.completed("id") is None and len(found) == 0


def test_of_very_many_replicas_the_ranks_follow_the_scores() -> None:
    found = dispatcher(replicas=200)
    one = claim("p" * 2000)
    ranks = found.rank(one, set(held(found)), [], 1.0)
    assert one.ticket is not None
    by_name = dict(zip((c.worker.id for c in one.ticket.candidates), one.ticket.decision.scores, strict=True))
    scores = [by_name[name] for rank in ranks[1:] for name in rank]
    assert scores == sorted(scores) and len(scores) == SPARE + 1
