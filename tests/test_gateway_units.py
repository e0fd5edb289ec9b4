"""The gateway's parts by themselves: prompts, admission, breakers, keys, settings, snapshots."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.gateway import snapshot
from kvist.gateway.admission import Admission, RateLimits
from kvist.gateway.auth import Keys, hashed
from kvist.gateway.breaker import Breaker
from kvist.gateway.prompt import BadBody, parse, to_query
from kvist.gateway.settings import build, load_settings
from kvist.model import Query
from kvist.routing import Router, make_policy


def query(kind: str = "chat", tenant: str = "", **body: object) -> Query:
    return to_query(0, kind, parse(json.dumps(body).encode()), tenant)


def test_a_longer_conversation_extends_the_shorter_ones_prompt() -> None:
    history = [{"role": "user", "content": "a"}]
    prompts = []
    for text in ("b", "c"):
        prompts.append(query(messages=history).prompt)
        history = [*history, {"role": "assistant", "content": text}]
    prompts.append(query(messages=history).prompt)
    assert prompts[1].startswith(prompts[0]) and prompts[2].startswith(prompts[1])
    assert query("completion", prompt="abcdef").prompt.startswith(query("completion", prompt="abc").prompt)


def test_whatever_changes_the_prompt_takes_part() -> None:
    message = [{"role": "user", "content": "a"}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:1"}}]}]
    prompts = [query(messages=message), query(messages=message, tools=[1]), query(messages=image)]
    assert len({q.prompt for q in prompts}) == 3
    salts = [
        query(messages=message),
        query(messages=message, model="m"),
        query(messages=message, cache_salt="s"),
        query(messages=message, cache_salt="s", tenant="t"),
        query(messages=message, chat_template="{{}}"),
        query(messages=message, documents=[{}]),
        query("completion", prompt="a"),
    ]
    assert len({q.salt for q in salts}) == len(salts)


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("chat", b"{", "not valid JSON"),
        ("chat", b'{"messages": null}', "`messages` is missing"),
        ("chat", b'{"model": 3, "messages": []}', "model"),
        ("completion", b"{}", "`prompt` is missing"),
        ("embeddings", b"{}", "`input` is missing"),
        ("chat", b"[1]", "object"),
    ],
)
def test_bad_bodies_are_named(kind: str, body: bytes, words: str) -> None:
    with pytest.raises(BadBody, match=words):
        to_query(0, kind, parse(body), "")


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "cancel", "late"]), st.integers(0, 3)), max_size=60)
)
def test_admission_never_lets_too_many_in_and_forgets_nobody(ops: list[tuple[str, int]]) -> None:
    admission = Admission(most=2, queue=3, timeout=10)
    active, waiting, ended = 0, {}, 0  # waiting: number -> (priority, entry)
    started: list[int] = []
    for now, (op, priority) in enumerate(ops):
        if op == "enter":
            if admission.enter():
                assert active < 2 and not waiting
                active += 1
            else:
                entry = admission.wait(
                    priority, "key", now, lambda n=now: started.append(n), lambda n=now: waiting.pop(n)
                )
                assert (entry is None) == (len(waiting) == 3)
                if entry is not None:
                    waiting[now] = (priority, entry)
        elif op == "leave" and active:
            order = sorted(waiting, key=lambda n: (-waiting[n][0], n))
            admission.leave()
            ended += 1
            active -= 1
            if order:
                assert started[-1] == order[0], "the highest priority, then who came first"
                del waiting[order[0]]
                active += 1
        elif op == "cancel" and waiting:
            admission.cancel(waiting.pop(next(iter(waiting)))[1])
        elif op == "late":
            before = {n for n, (_, entry) in waiting.items() if entry.deadline <= now}
            admission.sweep(now)
            assert not before & set(waiting)
        assert (admission.active, admission.waiting) == (active, len(waiting))


def test_keys_of_one_priority_take_turns() -> None:
    admission = Admission(most=1, queue=10, timeout=10)
    started: list[str] = []
    assert admission.enter()
    for name in ("loud 1", "loud 2", "loud 3", "quiet 1"):
        assert admission.wait(0, name.split()[0], 0.0, lambda name=name: started.append(name), lambda: None)
    for _ in range(4):
        admission.leave()
    assert started == ["loud 1", "quiet 1", "loud 2", "loud 3"]


def test_rate_limits_refill_and_stay_bounded() -> None:
    limits = RateLimits(rate=2.0, burst=3)
    assert [limits.take("a", 0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    assert limits.take("b", 0.0) == 0 and limits.take("a", 0.6) == 0
    for i in range(20_000):
        limits.take(f"key{i}", 1.0)
    assert len(limits._buckets) <= 10_000
    assert all(RateLimits(0, 0).take("a", 0.0) == 0 for _ in range(100))


def test_a_breaker_opens_tries_once_and_closes() -> None:
    breaker = Breaker(threshold=2, seconds=10)
    breaker.failed(0)
    assert breaker.state(0) == "closed" and breaker.allows(0)
    breaker.failed(1)
    assert breaker.state(5) == "open" and not breaker.allows(5)
    assert breaker.state(11) == "half_open" and breaker.allows(11)
    breaker.sent(11)
    assert not breaker.allows(11), "one request decides"
    breaker.released()
    assert breaker.allows(11), "one that said nothing does not"
    breaker.sent(12)
    breaker.failed(12)
    assert breaker.state(13) == "open"
    breaker.sent(23)
    breaker.succeeded()
    assert breaker.state(23) == "closed" and breaker.failures == 0


def test_keys_are_hashed_and_compared() -> None:
    keys = Keys(["plain", hashed("other")])
    assert keys.check(b"Bearer plain") and keys.check(b"Bearer other")
    assert keys.check(b"Bearer plain") != keys.check(b"Bearer other"), "callers are told apart"
    for wrong in (None, b"", b"Bearer ", b"Bearer Plain", hashed("other").encode()):
        assert keys.check(wrong) is None
    assert Keys([]).check(None) == ""
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        Keys(["sha256:abc"])


def test_settings_name_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('[serve]\nport = 9\nworker-urls = ["http://a"]\n')
    assert build(load_settings(file), str(file)).worker_urls == ["http://a"]
    file.write_text("port = [")
    with pytest.raises(ValueError, match=r"gateway\.toml"):
        load_settings(file)
    for values, words in (
        ({"queue_size": -1}, "queue_size must not be negative"),
        ({"port": 70000}, "port must lie between"),
        ({"unknown": 1}, "unknown"),
        ({"tls_cert": "a"}, "tls_cert and tls_key go together"),
        ({"allow_paths": ["x"]}, "must start with /"),
        ({"connect_timeout": 0}, "connect_timeout must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            build(values, "test")


def test_snapshots_survive_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    policy = make_policy("lbgr", rng=Random(0))
    Router(policy).add_worker("a")
    assert not snapshot.load(policy, path), "none yet"
    snapshot.save(policy, path)
    assert [file.name for file in tmp_path.iterdir()] == ["learned.json"], "no temporary file is left"
    again = make_policy("lbgr", rng=Random(0))
    assert snapshot.load(again, path)
    Router(again).add_worker("a")
    assert again.snapshot() == policy.snapshot()
    assert not snapshot.load(make_policy("random"), path), "another policy's"
    path.write_text('{"version": 1, "policy": "lbgr", "state": {"a": {"theta": []}}}')
    with pytest.raises(ValueError, match="delete it to start afresh"):
        snapshot.load(again, path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"learned\.json"):
        snapshot.load(again, path)
