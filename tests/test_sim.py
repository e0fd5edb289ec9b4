"""The simulated cluster: determinism, conservation, joining and leaving, what the router may know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.engine import load_profile
from kvist.model import Query, pack
from kvist.routing import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.sim import SimConfig, WorkerSpec, simulate

SMALL = SimConfig(router="round_robin", eviction="l-lru", workers=2, kv_tokens=4000)


def load(count: int, rate: float = 20.0, seed: int = 0, groups: int = 8) -> Iterator[Query]:
    rng = Random(seed)
    at = 0.0
    for number in range(count):
        at += rng.expovariate(rate)
        group = rng.randrange(groups)
        tokens = [group] * (50 * (1 + group % 4)) + [
            rng.randrange(1000) for _ in range(rng.randrange(1, 200))
        ]
        yield Query(number, pack(tokens), output_tokens=rng.randrange(1, 20), arrival=at)


class Watching(RoutingPolicy):
    """Round robin that keeps what it is told."""

    name = "watching"

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.open: set[int | str] = set()
        self.ends: list[tuple[int | str, Outcome]] = []
        self.estimates: dict[int | str, int] = {}
        self.now = 0.0

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        self.turn += 1
        chosen = candidates[self.turn % len(candidates)]
        return Decision(chosen.worker.id, chosen.cached)

    def dispatched(self, ticket: Ticket, now: float) -> None:
        assert now >= self.now
        self.now = now
        assert ticket.query.id not in self.open
        self.open.add(ticket.query.id)
        self.estimates[ticket.query.id] = ticket.decision.cached

    def first_token(self, ticket: Ticket, now: float) -> None:
        assert now >= self.now
        self.now = now

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        assert now >= self.now
        self.now = now
        self.open.remove(ticket.query.id)
        self.ends.append((ticket.query.id, outcome))


@pytest.mark.parametrize("router", ["lbgr", "cache_aware", "power_of_two", "random"])
@pytest.mark.parametrize("eviction", ["rlt", "random-leaf"])
def test_identical_for_identical_seeds(router: str, eviction: str) -> None:
    config = replace(SMALL, router=router, eviction=eviction, kv_tokens=2000, seed=3)
    first, second = (simulate(load(150), config) for _ in range(2))
    assert first == second
    assert first.requests == first.completed == 150
    if router == "random":
        assert simulate(load(150), replace(config, seed=4)) != first


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([1.0, 20.0, 500.0]),
    block_size=st.sampled_from([1, 16]),
    kv_events=st.booleans(),
    order=st.sampled_from(["fcfs", "lpm", "slo"]),
)
def test_every_query_ends_once_and_takes_at_least_its_service(
    seed: int, rate: float, block_size: int, kv_events: bool, order: str
) -> None:
    queries = list(load(40, rate, seed))
    policy = Watching()
    config = replace(
        SMALL, block_size=block_size, kv_events=kv_events, order=order, kv_tokens=1000, seed=seed
    )
    result = simulate(queries, config, policy=policy)
    assert result.completed == 40 and result.failed == result.refused == 0
    assert not policy.open and len(policy.ends) == 40
    profile = load_profile(config.profile)
    by_id = {query.id: query for query in queries}
    for number, outcome in policy.ends:
        query = by_id[number]
        assert outcome.latency is not None and outcome.ttft is not None and outcome.cached_tokens is not None
        new = query.length - outcome.cached_tokens
        prefill = profile.step(new, 0.0, 0, 0)
        least = prefill + profile.step(1, 0.0, 0, 1) * (query.output_tokens - 1)
        assert outcome.ttft >= prefill * (1 - 1e-9) - 1e-9
        assert outcome.latency >= least * (1 - 1e-9) - 1e-9
    assert result.prompt_tokens == sum(query.length for query in queries)
    assert result.cached_tokens == sum(outcome.cached_tokens or 0 for _, outcome in policy.ends)
    assert result.output_tokens == sum(query.output_tokens for query in queries)
    assert sum(worker.requests for worker in result.workers) == 40
    assert all(worker.busy <= result.makespan * (1 + 1e-9) for worker in result.workers)
    assert 0 <= result.hit_rate <= 1 and result.goodput <= result.throughput
    assert 1 <= result.imbalance <= len(result.workers)


def test_kv_events_give_the_router_the_truth() -> None:
    """With room for every request at once, what the router expects is what the engine finds."""
    spaced = [replace_arrival(query, 5.0 * i) for i, query in enumerate(load(60))]
    policy = Watching()
    config = replace(SMALL, kv_events=True, kv_tokens=600, block_size=4)
    simulate(spaced, config, policy=policy)
    found = dict(policy.ends)
    lengths = {query.id: query.length for query in spaced}
    hits = 0
    for number, estimate in policy.estimates.items():
        cached = found[number].cached_tokens or 0
        assert cached == min(estimate, (lengths[number] - 1) // 4 * 4)
        hits += cached
    assert hits > 0


def replace_arrival(query: Query, arrival: float) -> Query:
    return Query(query.id, query.prompt, output_tokens=query.output_tokens, arrival=arrival)


def test_a_failed_worker_loses_nothing_when_rerouted() -> None:
    policy = Watching()
    fleet = (WorkerSpec("a", leaves=1.0), WorkerSpec("b"))
    result = simulate(load(80, rate=50.0), replace(SMALL, fleet=fleet), policy=policy)
    assert result.completed == 80 and result.failed == 0
    assert result.rerouted > 0
    failed = [end for end in policy.ends if end[1].status is Status.FAILED]
    assert len(failed) == result.rerouted
    assert not policy.open
    assert result.latency.count == 80


def test_a_failed_worker_fails_its_requests_when_asked_to() -> None:
    fleet = (WorkerSpec("a", leaves=1.0), WorkerSpec("b"))
    result = simulate(load(80, rate=50.0), replace(SMALL, fleet=fleet, on_failure="fail"))
    assert result.failed > 0 and result.rerouted == 0
    assert result.completed + result.failed == 80


def test_a_draining_worker_finishes_what_it_has() -> None:
    policy = Watching()
    fleet = (WorkerSpec("a", leaves=1.0, drains=True), WorkerSpec("b"))
    result = simulate(load(80, rate=50.0), replace(SMALL, fleet=fleet), policy=policy)
    assert result.completed == 80 and result.rerouted == 0
    assert all(outcome.status is Status.OK for _, outcome in policy.ends)
    assert 0 < result.workers[0].requests < 40


def test_queries_wait_for_a_worker_or_fail_if_none_will_come() -> None:
    late = simulate(load(10), replace(SMALL, fleet=(WorkerSpec("a", joins=60.0),)))
    assert late.completed == 10 and late.ttft.p50 > 55
    gone = simulate(load(10, rate=1.0), replace(SMALL, fleet=(WorkerSpec("a", leaves=3.0),)))
    assert gone.completed + gone.failed == 10 and gone.failed > 0


def test_waiting_times_of_a_single_server_queue() -> None:
    """One request at a time, all alike, Poisson arrivals: an M/D/1 queue, whose mean wait is known.

    Pollaczek-Khinchine: S * rho / (2 * (1 - rho)).
    """
    service = load_profile("llama-3.1-8b-l40").step(500, 500 * 250, 0, 0)
    for rho in (0.3, 0.7):
        rng, at, queries = Random(9), 0.0, []
        for number in range(20_000):
            at += rng.expovariate(rho / service)
            prompt = pack([number]) * 500  # no two share a prefix
            queries.append(Query(number, prompt, output_tokens=1, arrival=at))
        result = simulate(queries, replace(SMALL, workers=1, max_num_seqs=1))
        expected = service + service * rho / (2 * (1 - rho))
        assert result.latency.mean == pytest.approx(expected, rel=0.03)
        assert result.workers[0].busy == pytest.approx(20_000 * service)


def test_a_mixed_fleet() -> None:
    fleet = (
        WorkerSpec("slow", profile="llama-3.1-8b-l40", kv_tokens=1000, eviction="rlt"),
        WorkerSpec("fast", profile="llama-3.1-8b-h100", kv_tokens=8000, eviction="l-lru"),
    )
    result = simulate(load(200), replace(SMALL, fleet=fleet))
    slow, fast = result.workers
    assert (slow.capacity, fast.capacity) == (1000, 8000)
    assert slow.requests == fast.requests == 100
    assert slow.busy > fast.busy and slow.cached_tokens < fast.cached_tokens


def test_too_long_is_refused_and_the_rest_served() -> None:
    queries = list(load(20))
    queries[7] = Query(7, pack(range(5000)), output_tokens=1, arrival=queries[7].arrival)
    policy = Watching()
    result = simulate(queries, SMALL, policy=policy)
    assert result.refused == 1 and result.completed == 19
    assert not policy.open


def test_warm_up_requests_count_in_no_metric() -> None:
    whole, rest = simulate(load(100), SMALL), simulate(load(100), replace(SMALL, warmup=40))
    assert rest.requests == rest.completed == rest.ttft.count == 60
    assert rest.hit_rate > whole.hit_rate
    assert rest.makespan == whole.makespan
    assert sum(w.busy for w in rest.workers) < sum(w.busy for w in whole.workers)


def test_arrivals_are_consumed_lazily_and_in_order() -> None:
    taken = 0

    def counted() -> Iterator[Query]:
        nonlocal taken
        for query in load(50, rate=0.5):
            taken += 1
            yield query
            if query.id == 30:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(counted(), SMALL)
    assert taken == 31
    backwards = [replace_arrival(query, -float(i)) for i, query in enumerate(load(2))]
    with pytest.raises(ValueError, match="query 1 arrives"):
        simulate(backwards, SMALL)


def test_no_queries() -> None:
    result = simulate([], SMALL)
    assert result.requests == result.completed == 0
    assert result.ttft.mean == result.throughput == result.hit_rate == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workers": 0}, "workers"),
        ({"slo_ttft": 0.0}, "slo_ttft"),
        ({"warmup": -1}, "warmup"),
        ({"points": 1}, "points"),
        ({"on_failure": "cry"}, "on_failure"),
        ({"fleet": (WorkerSpec("a"), WorkerSpec("a"))}, "same id"),
        ({"fleet": (WorkerSpec("a", joins=2.0, leaves=1.0),)}, "leaves"),
        ({"router": "best"}, "best"),
        ({"eviction": "best"}, "best"),
        ({"order": "best"}, "best"),
        ({"profile": "best"}, "best"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"kv_tokens": 8, "block_size": 16}, "block"),
        ({"max_num_batched_tokens": 10}, "max_num_batched_tokens"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate(load(1), replace(SMALL, **change))  # type: ignore[arg-type]
