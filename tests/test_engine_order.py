"""Queue orders: who is passed over, for how long, and what an order does to hits."""

from __future__ import annotations

from random import Random

import pytest

from kvist.cache import PrefixCache, make_eviction
from kvist.engine.core import Engine
from kvist.engine.latency import load_profile
from kvist.engine.order import LOOKAHEAD
from kvist.model import Query, pack
from kvist.sim import SimConfig, simulate
from kvist.workloads import make_workload

PROFILE = load_profile("llama-3.1-8b-l40")


def engine(order: str) -> Engine:
    cache = PrefixCache(20_000, make_eviction("l-lru", rng=Random(0)))
    return Engine(cache, PROFILE, max_num_seqs=1, max_num_batched_tokens=2048, queue=order)


def query(number: int, group: int) -> Query:
    return Query(number, pack([group] * 500 + [9000 + number] * 20))


def waits_for(order: str, arrivals: int) -> int:
    """How many later requests of a hot prefix are served before one cold request; `arrivals` if all are."""
    server, now = engine(order), 0.0
    server.submit(query(0, 1), now)
    while not server.idle:
        now += server.begin_step(now) or 0.0
        server.end_step(now)
    server.submit(query(1, 2), now)  # cold
    served, number = 0, 2
    server.submit(query(number, 1), now)
    while served < arrivals:
        now += server.begin_step(now) or 0.0
        for request in server.end_step(now).finished:
            if request.query.id == 1:
                return served
            served += 1
            number += 1
            server.submit(query(number, 1), now)  # another hot one for each that ends
        if server.idle:
            break
    return served


def test_the_longest_prefix_first_starves_a_cold_request_and_k_lpm_bounds_it() -> None:
    assert waits_for("fcfs", 50) == 0
    assert waits_for("lpm", 50) == 50
    assert 0 < waits_for("k-lpm", 50) <= 4
    assert waits_for("shortest", 50) < 50, "waiting earns priority"
    assert waits_for("slo", 400) < 400, "its slack runs out"


def test_with_many_waiting_the_longest_prefix_goes_by_age() -> None:
    server, now = engine("lpm"), 0.0
    server.submit(query(0, 1), now)
    while not server.idle:
        now += server.begin_step(now) or 0.0
        server.end_step(now)
    server.submit(query(1, 2), now)
    for number in range(2, LOOKAHEAD + 3):
        server.submit(query(number, 1), now)
    assert len(server.waiting) > LOOKAHEAD and server.queue.pick(server, now) == 0
    server.waiting.pop()
    server.waiting.pop()
    assert server.queue.pick(server, now) == 1


@pytest.mark.parametrize("order", ["fcfs", "lpm", "k-lpm", "shortest", "slo"])
def test_under_load_every_request_is_served_in_every_order(order: str) -> None:
    workload = make_workload("gsp:groups=12,prompts=12,lengths=512/1024", rate=200.0)
    result = simulate(workload, SimConfig(router="round_robin", workers=2, kv_tokens=8000, order=order))
    assert result.completed == result.requests == 144


def test_the_longest_prefix_first_has_more_hits_where_the_cache_is_short() -> None:
    def hits(order: str) -> float:
        workload = make_workload("gsp:groups=24,prompts=12,lengths=1024", rate=200.0)
        config = SimConfig(router="round_robin", workers=1, kv_tokens=6000, eviction="l-lru", order=order)
        return simulate(workload, config).hit_rate

    assert hits("lpm") > hits("fcfs") + 0.1
