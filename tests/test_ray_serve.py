"""The router in a real local Ray cluster: several replicas, streams, failures, a death.

Skipped without Ray; `make test-scale` sets it up in an environment of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvist[ray]', or make test-scale")
serve = pytest.importorskip("ray.serve")

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(280)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A cluster of this machine alone; its HTTP port."""
    port = free_port()
    paths = [str(HERE), str(HERE.parent / "examples")]
    sys.path[:0] = paths
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()
    del sys.path[:2]


@pytest.fixture(scope="module")
def plain(cluster: int) -> tuple[Any, Any]:
    """Handles of the fan-out ingress and of its workers."""
    import ray_app

    fan = serve.run(ray_app.app, name="plain", route_prefix=None)
    return fan, serve.get_deployment_handle("Plain", "plain")


def router_of(handle: Any) -> Any:
    handle.remote({"prompt": "wake"}).result(timeout_s=30)
    return handle._router._asyncio_router.request_router


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def idle(router: Any) -> bool:
    return all(
        w.in_flight == w.in_flight_tokens == w.pending_prefill == 0 and w.load == 0
        for w in router.dispatcher.router.workers
    )


def test_a_prefix_sticks_to_its_replica_and_prefixes_spread(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router_of(handle)
    homes: dict[int, Counter[str]] = {}
    for turn in range(16):
        asked = [
            handle.remote({"prompt": f"group {group} " * 400 + str(turn), "sleep": 0.05})
            for group in range(6)
        ]
        for group, one in enumerate(asked):
            answer = one.result(timeout_s=30)
            if turn >= 4:
                homes.setdefault(group, Counter())[answer] += 1
    stuck = sum(count.most_common(1)[0][1] for count in homes.values())
    assert stuck >= 0.8 * 72, homes  # 1 in 3 by chance
    assert len({count.most_common(1)[0][0] for count in homes.values()}) > 1, homes


def test_load_spreads_and_queue_lengths_are_respected(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    started = time.monotonic()
    asked = [handle.remote({"prompt": "one prompt " * 200, "sleep": 0.2}) for _ in range(48)]
    answers = Counter(one.result(timeout_s=60) for one in asked)
    # 48 requests, 3 replicas, 8 at a time each: two rounds at best.
    assert time.monotonic() - started > 0.4
    assert len(answers) == 3 and max(answers.values()) <= 24, answers
    until(lambda: idle(router))


def test_what_fails_or_is_cancelled_gives_its_place_back_and_teaches_nothing(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    until(lambda: idle(router))
    policy = router.dispatcher.router.policy
    learned = policy._fleet.answers
    with pytest.raises(ValueError, match="as told"):
        handle.remote({"prompt": "p", "fail": True}).result(timeout_s=30)
    with pytest.raises(ValueError, match="as told"):
        list(handle.options(stream=True).stream.remote({"prompt": "p", "fail": True}))
    asked = [handle.remote({"prompt": "slow", "sleep": 20}) for _ in range(6)]
    until(lambda: sum(w.in_flight for w in router.dispatcher.router.workers) == 6)
    for one in asked:
        one.cancel()
    until(lambda: idle(router))
    assert policy._fleet.answers == learned
    until(lambda: len(router._unconfirmed) == 0 and not router._routing)


def test_cancelled_while_waiting_for_a_replica(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    busy = [handle.remote({"prompt": "b", "sleep": 1.5}) for _ in range(24)]
    until(lambda: sum(w.in_flight for w in router.dispatcher.router.workers) == 24)
    waiting = [handle.remote({"prompt": "w", "sleep": 0.01}) for _ in range(5)]
    time.sleep(0.2)
    for one in waiting:
        one.cancel()
    for one in busy:
        one.result(timeout_s=60)
    until(lambda: idle(router))


def test_streams_pass_and_their_first_item_is_seen(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    streams = handle.options(stream=True)
    stream = streams.stream.remote({"prompt": "s" * 400, "sleep": 0.2})
    items = [next(stream)]
    workers = list(streams._router._asyncio_router.request_router.dispatcher.router.workers)
    until(lambda: sum(w.pending_prefill for w in workers) == 0, 0.15)  # before the second item
    assert sum(w.in_flight for w in workers) == 1
    items += list(stream)
    assert len(items) == 5 and len(set(items)) == 1
    until(lambda: idle(router))


def test_calls_that_share_one_request_are_all_answered(plain: tuple[Any, Any]) -> None:
    fan, _ = plain
    answers = fan.remote(9).result(timeout_s=30)
    assert len(answers) == 9 and len(set(answers)) == 3


def test_a_prompt_function_is_asked(cluster: int) -> None:
    import ray_app

    handle = serve.run(ray_app.named, name="named", route_prefix=None)
    answers: dict[str, set[str]] = {}
    for turn in range(8):
        for group in ("x", "y", "z", "u"):
            job = {"text": group * 3000 + str(turn)}
            answer = handle.work.remote(job=job).result(timeout_s=30)
            if turn >= 2:
                answers.setdefault(group, set()).add(answer)
    router = handle._router._asyncio_router.request_router
    assert sum(w.cached_tokens for w in router.dispatcher.router.workers) > 0
    assert sum(len(found) for found in answers.values()) <= 6, answers
    serve.delete("named")


def test_lbgr_learns_what_the_replicas_take(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    policy = router.dispatcher.router.policy
    before = policy._fleet.answers
    for turn in range(60):
        handle.remote({"prompt": f"{turn} " * 100, "sleep": 0.05}).result(timeout_s=30)
    assert policy._fleet.answers >= before + 55
    predictions = [
        router.dispatcher.router.route(_query(f"{turn} new " * 100), time.monotonic()) for turn in range(3)
    ]
    for ticket in predictions:
        from kvist.routing import Outcome, Status

        router.dispatcher.router.complete(ticket, Outcome(Status.CANCELLED), time.monotonic())
    assert all(ticket.decision.predicted is not None for ticket in predictions)
    assert 0.02 < (predictions[0].decision.predicted or 0) < 0.5


def _query(text: str) -> Any:
    from kvist.model import Query

    return Query(0, text.encode(), unit=1)


def test_a_killed_replica_is_routed_around_and_its_successor_joins(plain: tuple[Any, Any]) -> None:
    _, handle = plain
    router = router_of(handle)
    names = {w.id for w in router.dispatcher.router.workers}
    assert len(names) == 3
    flying = [handle.remote({"prompt": f"{i}", "sleep": 0.5}) for i in range(9)]
    until(lambda: sum(w.in_flight for w in router.dispatcher.router.workers) == 9)
    ran = {w.id: w.in_flight for w in router.dispatcher.router.workers}
    doomed = handle.die.remote({"prompt": "die"})
    with pytest.raises(Exception, match=r"(?i)died|dead|unavailable"):
        doomed.result(timeout_s=30)
    after = [handle.remote({"prompt": f"{i}"}).result(timeout_s=30) for i in range(20)]
    left = names & {w.id for w in router.dispatcher.router.workers}
    assert len(left) == 2 and set(after) <= left
    lost = 0
    for one in flying:
        try:
            one.result(timeout_s=30)
        except Exception:
            lost += 1
    (dead,) = names - left
    assert lost <= ran[dead]
    until(lambda: idle(router))
    until(lambda: len({w.id for w in router.dispatcher.router.workers} - names) == 1, 60)
    fresh = ({w.id for w in router.dispatcher.router.workers} - names).pop()
    asked = [handle.remote({"prompt": f"{i} next", "sleep": 0.2}) for i in range(12)]
    assert fresh in {one.result(timeout_s=30) for one in asked}
    until(lambda: idle(router))


def test_the_example_answers_over_http_and_finds_prefixes(cluster: int) -> None:
    import ray_serve_app

    serve.run(ray_serve_app.app, name="example", route_prefix="/")
    url = f"http://127.0.0.1:{cluster}/v1/chat/completions"

    def ask(**extra: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "long story " * 300}], "max_tokens": 4, **extra}
        return urlopen(Request(url, json.dumps(body).encode()), timeout=30)

    first = json.load(ask())
    second = json.load(ask())
    assert first["replica"] == second["replica"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 700
    events = [line for line in ask(stream=True).read().split(b"\n\n") if line]
    assert len(events) == 5 and events[-1] == b"data: [DONE]"
    serve.delete("example")
