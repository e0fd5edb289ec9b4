"""A gateway that follows the KV events of embedded engines: what it expects is what they count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from threading import Thread

import pytest
from gateway_processes import Process, call, chat, engine, metric, running, state, wait_for

from kvist.launch.machine import take_ports

pytest.importorskip("zmq")

CHAT = "/v1/chat/completions"


@contextmanager
def following(
    count: int, *options: str, engine_options: tuple[str, ...] = ()
) -> Iterator[tuple[Process, list[Process]]]:
    """A gateway with `count` engines whose events it follows, and the engines."""
    ports = take_ports("127.0.0.1", 0, 2 * count)
    live, replay = ports[:count], ports[count:]
    engines = [
        engine(
            f"--kv-events=tcp://127.0.0.1:{live[i]}",
            f"--kv-events-replay=tcp://127.0.0.1:{replay[i]}",
            *engine_options,
        )
        for i in range(count)
    ]
    addresses = [f"--kv-events={port}" for port in live] + [f"--kv-events-replay={port}" for port in replay]
    with running(engines, "--tokenizer=embedded", *addresses, *options) as gateway:
        for each in engines:
            wait_for(lambda each=each: subscriptions(each) == 1)
        yield gateway, engines


def subscriptions(worker: Process) -> float:
    """What the engine publishes while it has one reaches the gateway."""
    return metric(worker.url, "kvist:kv_event_subscriptions")


def knows(gateway: Process) -> list[str]:
    return [worker["knows"] for worker in state(gateway.url)["workers"]]


@contextmanager
def closing(process: Process) -> Iterator[None]:
    try:
        yield
    finally:
        process.stop()


def settle(gateway: Process, worker: Process, missed: float = 0.0) -> None:
    """Until the gateway has heard all that the engine has had to say, but for the events it missed."""
    said = metric(worker.url, "kvist:kv_events_total") - missed
    wait_for(lambda: metric(gateway.url, "kvist_kv_events_events_total") == said)


def test_estimates_are_what_the_engines_count() -> None:
    rng = Random(1)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(2000)) for _ in range(4)]
    with following(2, "--policy=lbgr") as (gateway, _):
        for i in range(24):
            text = texts[i % 4][: rng.randrange(200, 2000)]
            body = chat(
                text, model="tiny", max_tokens=4, stream=i % 2 == 0, stream_options={"include_usage": True}
            )
            status, _, _ = call(gateway.url, CHAT, body)
            assert status == 200
            wait_for(lambda: metric(gateway.url, "kvist_kv_events_batches_total") > 0)
        recent = state(gateway.url)["recent"]
        assert len(recent) == 24
        hits = 0
        for entry in recent:
            assert entry["cached_true"] is not None
            assert entry["cached"] == entry["cached_true"], entry
            hits += entry["cached"] > 0
        assert hits > 10
        assert "exact" in knows(gateway) and "partial" not in knows(gateway)
        assert metric(gateway.url, "kvist_tokenized_prompts_total", agrees="true") == 24
        for name in ("gaps", "resets", "invalid", "unknown_parents", "restarts"):
            assert metric(gateway.url, f"kvist_kv_events_{name}_total") == 0, name


def test_the_next_turn_may_come_at_once() -> None:
    """Before the engine's word for the last turn's prompt and answer."""
    with following(1) as (gateway, (worker,)):
        assert call(gateway.url, CHAT, chat("first words " * 20, model="tiny", max_tokens=1))[0] == 200
        wait_for(lambda: knows(gateway) == ["exact"])  # before its first word nothing is known of an engine
        talk = [{"role": "user", "content": "once upon a time " * 40}]
        for turn in range(16):
            body = {"messages": talk, "model": "tiny", "max_tokens": 5 + 3 * turn}
            status, said, _ = call(gateway.url, CHAT, body)
            assert status == 200
            answer = json.loads(said)["choices"][0]["message"]
            talk += [answer, {"role": "user", "content": f"and turn {turn}?"}]
        entries = state(gateway.url)["recent"][1:]
        assert all(entry["cached"] == entry["cached_true"] for entry in entries), entries
        assert [entry["cached"] > 0 for entry in entries] == [False] + [True] * 15
        settle(gateway, worker)
        assert metric(gateway.url, "kvist_kv_events_expected_blocks_total", came="true") > 20
        assert metric(gateway.url, "kvist_kv_events_expected_blocks_total", came="false") == 0


def test_an_equal_prompt_may_come_while_the_first_is_computed() -> None:
    with following(1, engine_options=("--speed=1",)) as (gateway, (worker,)):
        for content in ("a long prompt " * 5000, "another one " * 5000):
            body = chat(content, model="tiny", max_tokens=1)
            first = Thread(target=call, args=(gateway.url, CHAT, body))
            first.start()
            wait_for(lambda: metric(worker.url, "vllm:num_requests_running") == 1)
            assert call(gateway.url, CHAT, body)[0] == 200
            first.join()
        entries = sorted(entry["cached"] for entry in state(gateway.url)["recent"])
        true = sorted(entry["cached_true"] for entry in state(gateway.url)["recent"])
        assert entries == true and true[1] < 100 and true[2] > 10_000


def test_a_flushed_engine_is_believed_empty() -> None:
    with following(1) as (gateway, engines):
        body = chat("x" * 1000, model="tiny", max_tokens=1)
        for _ in range(2):
            call(gateway.url, CHAT, body)
        wait_for(lambda: knows(gateway) == ["exact"])
        assert state(gateway.url)["recent"][-1]["cached"] > 100
        assert call(engines[0].url, "/flush_cache", b"")[0] == 200
        wait_for(lambda: state(gateway.url)["workers"][0]["index_tokens"] == 0)
        call(gateway.url, CHAT, body)
        assert state(gateway.url)["recent"][-1]["cached"] == 0


def test_eviction_is_followed() -> None:
    """A cache of 2 000 tokens and prompts of 300: what fell out is no longer expected."""
    with following(1, engine_options=("--kv-tokens=2000",)) as (gateway, (worker,)):
        for i in range(30):
            body = chat(f"{i % 11} " + "y" * 1200, model="tiny", max_tokens=1)
            assert call(gateway.url, CHAT, body)[0] == 200
            settle(gateway, worker)
        entries = state(gateway.url)["recent"]
        held = state(gateway.url)["workers"][0]["index_tokens"]
        assert 0 < held <= 2000
        assert sum(entry["cached_true"] > 0 for entry in entries) > 5
        assert all(entry["cached"] == entry["cached_true"] for entry in entries), entries


def test_salted_prompts_do_not_match_others() -> None:
    with following(1) as (gateway, (worker,)):
        for salt in ("a", "a", "b", None, None):
            body = chat("z" * 1000, model="tiny", max_tokens=1, **({"cache_salt": salt} if salt else {}))
            assert call(gateway.url, CHAT, body)[0] == 200
            settle(gateway, worker)
        assert knows(gateway) == ["exact"]
        cached = [(entry["cached"], entry["cached_true"]) for entry in state(gateway.url)["recent"]]
        assert [estimate > 0 for estimate, _ in cached] == [False, True, False, False, True]
        assert all(estimate == true for estimate, true in cached), cached


def test_bad_addresses_end_in_one_line() -> None:
    import subprocess
    import sys

    for options, words in (
        (["--kv-events=5557"], "kv_events needs tokenizer"),
        (["--kv-events=udp://x", "--tokenizer=embedded"], "is no address to connect to"),
        (["--kv-events=1", "--kv-events=2", "--kv-events=3", "--tokenizer=embedded"], "one for each"),
        (["--tokenizer=/nowhere"], "tokenizer.json"),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "kvist",
                "serve",
                "--port=0",
                "--worker-urls=http://127.0.0.1:9",
                *options,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_gateway_that_comes_late_has_the_past_replayed() -> None:
    live, replay, other = take_ports("127.0.0.1", 0, 3)
    worker = engine(f"--kv-events=tcp://127.0.0.1:{live}", f"--kv-events-replay=tcp://127.0.0.1:{replay}")
    blind = engine(f"--kv-events=tcp://127.0.0.1:{other}")
    old, new = chat("old " * 300, model="tiny", max_tokens=1), chat("new " * 300, model="tiny", max_tokens=1)
    for each in (worker, blind):
        assert call(each.url, "/v1/chat/completions", old)[0] == 200
    options = ("--tokenizer=embedded", f"--kv-events={live}", f"--kv-events-replay={replay}")
    with closing(blind), running([worker], *options) as gateway:
        for body in (new, old):
            assert call(gateway.url, CHAT, body)[0] == 200
            wait_for(lambda: knows(gateway) == ["exact"])
        first, second = state(gateway.url)["recent"]
        assert (first["cached"], first["cached_true"]) == (0, 0)
        assert second["cached"] == second["cached_true"] > 200, "stored before the gateway was there"
        assert metric(gateway.url, "kvist_kv_events_replays_total") == 1
        spec = {"url": blind.url, "kv_events": f"tcp://127.0.0.1:{other}", "kv_events_replay": ""}
        assert call(gateway.url, "/workers", spec)[0] == 201
        assert call(gateway.url, f"/workers/{worker.url}", method="DELETE")[0] == 200
        wait_for(lambda: [row["id"] for row in state(gateway.url)["workers"]] == [blind.url])
        wait_for(lambda: subscriptions(blind) == 1)
        missed = metric(blind.url, "kvist:kv_events_total")
        for body in (new, new):
            assert call(gateway.url, CHAT, body)[0] == 200
            settle(gateway, blind, missed)
        assert knows(gateway) == ["partial"], "without a replay a part is all that is known"
        entry = state(gateway.url)["recent"][-1]
        assert entry["cached"] == entry["cached_true"] > 200


def test_an_engine_that_starts_again_is_empty() -> None:
    http, live = take_ports("127.0.0.1", 0, 2)
    options = (f"--port={http}", f"--kv-events=tcp://127.0.0.1:{live}")
    body = chat("again " * 300, model="tiny", max_tokens=1)
    first = engine(*options)
    with running([first], "--tokenizer=embedded", f"--kv-events={live}", "--retry-max-retries=0") as gateway:
        wait_for(lambda: subscriptions(first) == 1)
        for _ in range(2):
            assert call(gateway.url, CHAT, body)[0] == 200
        wait_for(lambda: knows(gateway) == ["exact"])
        assert state(gateway.url)["recent"][-1]["cached"] > 200
        first.process.kill()
        first.process.wait()
        wait_for(lambda: knows(gateway) == ["silent"])
        second = engine(*options)
        try:
            wait_for(lambda: subscriptions(second) == 1)
            other = chat("something else " * 100, model="tiny", max_tokens=1)
            assert call(gateway.url, CHAT, other)[0] == 200
            wait_for(lambda: knows(gateway) == ["exact"])
            assert metric(gateway.url, "kvist_kv_events_restarts_total") == 1
            assert call(gateway.url, CHAT, body)[0] == 200
            entry = state(gateway.url)["recent"][-1]
            assert (entry["cached"], entry["cached_true"]) == (0, 0), "what the first one held is forgotten"
        finally:
            second.stop()
