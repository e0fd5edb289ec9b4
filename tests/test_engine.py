"""The engine against a slow, obvious one, and its accounts under arbitrary sequences of events."""

from __future__ import annotations

from random import Random

import pytest
from engine_oracle import NaiveEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cache import PrefixCache, make_eviction
from kvist.engine import ORDERS, Engine, Refused, Request, State, load_profile
from kvist.engine.latency import LatencyProfile
from kvist.model import Query, pack

PROFILE = load_profile("llama-3.1-8b-l40")


def make(
    capacity: int = 4000,
    block_size: int = 1,
    eviction: str = "l-lru",
    profile: LatencyProfile = PROFILE,
    **kwargs: object,
) -> Engine:
    cache = PrefixCache(capacity, make_eviction(eviction, rng=Random(1)), block_size=block_size)
    return Engine(cache, profile, **kwargs)  # type: ignore[arg-type]


def query(number: int, tokens: list[int], output: int = 4, answer: list[int] | None = None) -> Query:
    return Query(number, pack(tokens), output_tokens=output, answer=pack(answer or []))


def run(engine: Engine, now: float = 0.0) -> float:
    while (end := engine.begin_steps(now)) is not None:
        assert end > now
        now = end
        engine.end_step(now)
    return now


def assert_empty(engine: Engine) -> None:
    cache = engine.cache
    assert engine.idle and not engine.running and not engine.waiting
    assert cache.locked == 0 and cache.reserved == 0
    assert cache.cached + cache.free == cache.capacity
    assert engine.kv_usage == 0
    assert engine._decodes == 0 and engine._decode_kv == 0 and not any(engine._needs)


def test_one_request_step_by_step() -> None:
    engine = make(max_num_batched_tokens=300)
    request = engine.submit(query(0, list(range(700)), output=3), 0.0)
    durations = []
    now = 0.0
    while (taken := engine.begin_step(now)) is not None:
        now += taken
        durations.append(taken)
        engine.end_step(now)
    step = PROFILE.step
    assert durations == pytest.approx(
        [
            step(300, 300 * 150, 0, 0),
            step(300, 300 * 450, 0, 0),
            step(100, 100 * 650, 0, 0),
            step(1, 0, 701, 1),
            step(1, 0, 702, 1),
        ]
    )
    assert request.first_token == pytest.approx(sum(durations[:3]))
    assert request.finished == now
    assert request.cached == 0 and request.generated == 3
    assert engine.cache.cached == 700  # the output is not known, so its KV is freed
    assert_empty(engine)


@pytest.mark.parametrize(("block_size", "hit"), [(1, 31), (16, 16)])
def test_a_full_hit_still_computes_the_end_of_the_prompt(block_size: int, hit: int) -> None:
    engine = make(block_size=block_size)
    engine.submit(query(0, list(range(32))), 0.0)
    now = run(engine)
    request = engine.submit(query(1, list(range(32))), now)
    run(engine, now)
    assert request.cached == hit
    assert engine.stats.prompt_tokens == 64 and engine.stats.hit_tokens == hit
    assert engine.cache.cached == 32


def test_a_full_hit_in_a_full_cache_is_served() -> None:
    engine = make(capacity=32)
    for number in range(2):
        engine.submit(query(number, list(range(32)), output=1), 0.0)
        run(engine)
    assert engine.stats.finished == 2 and engine.stats.hit_tokens == 31
    assert_empty(engine)


def test_requests_of_one_step_share_a_prefix() -> None:
    engine = make()
    shared = list(range(100))
    first = engine.submit(query(0, [*shared, 7]), 0.0)
    second = engine.submit(query(1, [*shared, 8]), 0.0)
    run(engine)
    assert (first.cached, second.cached) == (0, 100)
    assert engine.cache.cached == 102


def test_a_known_answer_is_cached_but_for_its_last_token() -> None:
    engine = make()
    engine.submit(query(0, [1, 2, 3], output=4, answer=[10, 11, 12, 13]), 0.0)
    run(engine)
    assert engine.cache.peek(pack([1, 2, 3, 10, 11, 12, 13, 14])) == 6
    assert_empty(engine)


def test_refusals_name_the_reason() -> None:
    engine = make(capacity=100, block_size=16)
    for bad, said in (
        (query(0, []), "empty"),
        (query(1, [1] * 90, output=20), "90 \\+ 20 tokens exceed the KV cache of 96"),
        (query(2, [1], output=0), "output_tokens"),
        (Query(3, b"text", unit=1), "1 bytes a token"),
    ):
        with pytest.raises(Refused, match=said):
            engine.submit(bad, 0.0)
    assert engine.stats.refused == 4
    request = engine.submit(query(4, list(range(90)), output=7), 0.0)  # 96 tokens of KV: just fits
    run(engine)
    assert request.state is State.DONE and not request.aborted
    assert_empty(engine)


def test_bad_limits() -> None:
    with pytest.raises(ValueError, match="max_num_seqs"):
        make(max_num_seqs=0)
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        make(max_num_seqs=64, max_num_batched_tokens=32)
    with pytest.raises(ValueError, match="fcfs"):
        make(queue="fastest")
    engine = make()
    engine.submit(query(0, [1]), 0.0)
    engine.begin_step(0.0)
    with pytest.raises(ValueError, match="end_step"):
        engine.begin_step(0.0)


def test_memory_pressure_preempts_the_last_admitted_and_recomputes_it() -> None:
    engine = make(capacity=100)
    first = engine.submit(query(0, list(range(40)), output=40), 0.0)
    second = engine.submit(query(1, list(range(100, 140)), output=40), 0.0)
    run(engine)
    assert first.preempted == 0 and second.preempted >= 1
    assert engine.stats.finished == 2
    assert second.generated == 40
    assert engine.stats.output_tokens == 80
    assert_empty(engine)


def test_abort_in_every_state_and_while_a_step_is_under_way() -> None:
    for block_size in (1, 4):
        engine = make(capacity=400, block_size=block_size, max_num_batched_tokens=64, max_num_seqs=2)
        decoding = engine.submit(query(0, [1] * 8, output=50), 0.0)
        prefilling = engine.submit(query(1, [2] * 200, output=50), 0.0)
        waiting = engine.submit(query(2, [3] * 20, output=50), 0.0)
        now = 0.0
        for _ in range(2):
            now += engine.begin_step(now) or 0.0
            engine.end_step(now)
        assert [r.state for r in (decoding, prefilling, waiting)] == [
            State.DECODE,
            State.PREFILL,
            State.WAITING,
        ]
        engine.begin_step(now)
        assert all(engine.abort(r) for r in (decoding, prefilling, waiting))
        assert not engine.abort(waiting)
        result = engine.end_step(now + 1)
        assert not result.first and not result.finished
        assert_empty(engine)
        assert engine.stats.aborted == 3


def test_streaming_lists_every_token_once() -> None:
    engine = make(capacity=300, block_size=16, stream=True)
    rng = Random(5)
    requests = [
        engine.submit(query(n, [rng.randrange(50) for _ in range(rng.randrange(1, 90))], output=30), 0.0)
        for n in range(12)
    ]
    tokens: dict[Request, int] = dict.fromkeys(requests, 0)
    now = 0.0
    while (end := engine.begin_steps(now)) is not None:
        now = end
        result = engine.end_step(now)
        for request in [*result.first, *result.decoded]:
            tokens[request] += 1
    assert engine.stats.preemptions > 0
    assert set(tokens.values()) == {30}


def test_orders_change_who_comes_first() -> None:
    served = {}
    for name in ORDERS:
        engine = make(queue=name, max_num_seqs=1)
        engine.submit(query(0, list(range(500))), 0.0)
        now = run(engine)
        engine.submit(query(1, list(range(2000, 3000))), now)
        engine.submit(query(2, [*range(500), 9]), now)
        order = []
        while (end := engine.begin_steps(now)) is not None:
            now = end
            order += [request.query.id for request in engine.end_step(now).finished]
        served[name] = order
    assert served["fcfs"] == [1, 2]
    assert served["lpm"] == served["k-lpm"] == served["shortest"] == [2, 1]


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[float, Query]]:
    """Arrival gaps and queries over few tokens, so that prefixes are shared and caches overflow."""
    count = draw(st.integers(1, 14))
    found, at = [], 0.0
    rng = Random(draw(st.integers(0, 2**32)))
    for number in range(count):
        at += rng.choice((0.0, 0.0, 0.01, 0.05, 0.5))
        prefix = [rng.randrange(2)] * rng.randrange(0, 60)
        tokens = prefix + [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        output = rng.randrange(1, 40)
        answer = [rng.randrange(3) for _ in range(output)] if rng.random() < 0.4 else []
        found.append((at, query(number, tokens, output, answer)))
    return found


def drive(engine: Engine | NaiveEngine, load: list[tuple[float, Query]], many: bool) -> list[Request]:
    """Feed arrivals at the step boundary after they are due; run to the end."""
    requests, now, i = [], 0.0, 0
    while i < len(load) or not engine.idle:
        if engine.idle:
            now = max(now, load[i][0])
        while i < len(load) and load[i][0] <= now:
            requests.append(engine.submit(load[i][1], load[i][0]))
            i += 1
        until = (load[i][0] if i < len(load) else float("inf")) if many else float("-inf")
        end = engine.begin_steps(now, until)
        assert end is not None and end > now
        now = end
        engine.end_step(now)
    return requests


@settings(max_examples=300, deadline=None)
@given(
    load=workloads(),
    block_size=st.sampled_from([1, 4, 16]),
    capacity=st.sampled_from([144, 200, 1000]),
    seqs=st.sampled_from([1, 3, 32]),
    budget=st.sampled_from([32, 50, 2048]),
    many=st.booleans(),
)
def test_same_times_as_the_naive_engine(
    load: list[tuple[float, Query]], block_size: int, capacity: int, seqs: int, budget: int, many: bool
) -> None:
    """Every request of the fast engine has the very times, hits and preemptions of one without sums kept."""
    engine = make(capacity, block_size, max_num_seqs=seqs, max_num_batched_tokens=budget)
    naive = NaiveEngine(make(capacity, block_size).cache, PROFILE, seqs, budget)
    fast, slow = drive(engine, load, many), drive(naive, load, False)
    for a, b in zip(fast, slow, strict=True):
        assert (a.first_token, a.finished) == (b.first_token, b.finished)
        assert (a.cached, a.preempted, a.generated) == (b.cached, b.preempted, b.generated)
    assert engine.stats.steps == naive.steps
    assert engine.cache.cached == naive.cache.cached
    assert_empty(engine)


@settings(max_examples=200, deadline=None)
@given(
    load=workloads(),
    block_size=st.sampled_from([1, 16]),
    eviction=st.sampled_from(["rlt", "l-lru", "l-lfu", "random-leaf"]),
    order=st.sampled_from(sorted(ORDERS)),
    seed=st.integers(0, 1000),
)
def test_accounts_under_aborts(
    load: list[tuple[float, Query]], block_size: int, eviction: str, order: str, seed: int
) -> None:
    """KV never exceeds the capacity, time never goes back, nothing is lost, and all comes back at the end."""
    rng = Random(seed)
    engine = make(160, block_size, eviction, queue=order, max_num_seqs=8, max_num_batched_tokens=32)
    requests: list[Request] = []
    finished: list[Request] = []
    now, i = 0.0, 0

    def maybe_abort() -> None:
        if requests and rng.random() < 0.15:
            engine.abort(rng.choice(requests))

    while i < len(load) or not engine.idle:
        while i < len(load) and (engine.idle or load[i][0] <= now):
            now = max(now, load[i][0])
            requests.append(engine.submit(load[i][1], now))
            i += 1
        taken = engine.begin_step(now)
        if taken is None:
            continue
        assert taken > 0
        maybe_abort()
        now += taken
        finished += engine.end_step(now).finished
        maybe_abort()
        cache = engine.cache
        assert cache.cached + cache.reserved + cache.free == cache.capacity
        assert cache.free >= 0 and 0 <= cache.locked <= cache.cached
        assert 0 <= engine.kv_usage <= 1
        held = {r for r in requests if r.state in (State.PREFILL, State.DECODE)}
        assert held == set(engine.running) and len(held) <= 8
    assert_empty(engine)
    assert len(set(finished)) == len(finished)
    assert set(requests) == set(finished) | {r for r in requests if r.aborted}
    for request in finished:
        assert request.admitted is not None and request.first_token is not None
        assert request.finished is not None
        assert request.submitted <= request.admitted < request.first_token <= request.finished
        query = request.query
        alone = PROFILE.step(1, 0.0, 0, 0) * query.output_tokens
        assert request.finished - request.submitted >= alone * (1 - 1e-9)
