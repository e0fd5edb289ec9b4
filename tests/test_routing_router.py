"""The router's bookkeeping: whatever happens to requests, all that was added is taken off again."""

from __future__ import annotations

from math import isfinite
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query, pack
from kvist.routing import ROUTERS, NoWorker, Outcome, Router, Status, Ticket, make_policy

steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["route", "route", "route", "first", "ok", "fail", "cancel", "leave", "join", "drain"]
        ),
        st.integers(0, 30),
        st.floats(0, 5),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", sorted(ROUTERS))
@settings(max_examples=60, deadline=None)
@given(ops=steps)
def test_everything_is_given_back(name: str, ops: list[tuple[str, int, float]]) -> None:
    router = Router(make_policy(name, rng=Random(1)))
    now, flying, joined = 0.0, list[Ticket](), 3
    for i in range(joined):
        router.add_worker(f"w{i}", now)
    for op, number, wait in ops:
        now += wait
        ids = [worker.id for worker in router.workers]
        if op == "route":
            query = Query(number, pack(range(number, number * 3 + 1)))
            try:
                flying.append(router.route(query, now))
            except NoWorker:
                assert all(worker.draining for worker in router.workers)
                continue
            ticket = flying[-1]
            assert 0 <= ticket.decision.cached <= query.length
            assert all(isfinite(score) for score in ticket.decision.scores)
        elif op == "join":
            router.add_worker(f"w{joined}", now)
            joined += 1
        elif op == "leave" and ids:
            router.remove_worker(ids[number % len(ids)], now)
        elif op == "drain" and ids:
            router.drain(ids[number % len(ids)], number % 2 == 0)
        elif flying and op == "first":
            router.first_token(flying[number % len(flying)], now)
        elif flying:
            ticket = flying.pop(number % len(flying))
            status = {"ok": Status.OK, "fail": Status.FAILED}.get(op, Status.CANCELLED)
            cached = number if number % 2 else None
            router.complete(ticket, Outcome(status, cached_tokens=cached), now)
            router.complete(ticket, Outcome(status), now)  # a second time does nothing
        for worker in router.workers:
            mine = [ticket for ticket in flying if ticket.worker is worker]
            assert worker.in_flight == len(mine)
            assert worker.in_flight_tokens == sum(ticket.query.length for ticket in mine)
            assert worker.pending_prefill == sum(
                ticket.query.length - ticket.decision.cached
                for ticket in mine
                if ticket.first_token_at is None
            )
            assert worker.load >= 0 and isfinite(worker.load)
    for ticket in flying:
        router.complete(ticket, Outcome(Status.CANCELLED), now)
    for worker in router.workers:
        assert (worker.in_flight, worker.in_flight_tokens, worker.pending_prefill) == (0, 0, 0)
        assert worker.load == 0


def test_allowed_restricts_and_draining_excludes() -> None:
    router = Router(make_policy("least_load"))
    for name in "abc":
        router.add_worker(name)
    query = Query(0, pack(range(9)))
    assert router.route(query, 0.0, allowed={"b"}).worker.id == "b"
    router.drain("b")
    with pytest.raises(NoWorker):
        router.route(query, 0.0, allowed={"b"})
    router.drain("b", False)
    assert router.route(query, 0.0, allowed={"b"}).worker.id == "b"
    with pytest.raises(ValueError, match="is there already"):
        router.add_worker("a")


def test_the_policy_can_change_under_way() -> None:
    """Tickets in flight are settled with the policy that made them."""
    router = Router(make_policy("lbgr", rng=Random(0)))
    router.add_worker("a")
    old = router.policy
    query = Query(0, pack(range(2000)))
    ticket = router.route(query, 0.0)
    assert router.worker("a").load > 0
    router.set_policy(make_policy("lbgr", rng=Random(0)), 0.5)
    router.complete(ticket, Outcome(), 1.0)
    assert router.worker("a").in_flight == 0 and router.worker("a").load == 0
    assert old.health()["a"]["answers"] == 1
    assert router.policy.health()["a"]["answers"] == 0


def test_prefixes_are_followed_after_routing() -> None:
    router = Router(make_policy("cache_aware", rng=Random(0)))
    for name in "abcd":
        router.add_worker(name)
    first = router.route(Query(0, pack(range(1000))), 0.0)
    again = router.route(Query(1, pack([*range(900), *range(5000, 5100)])), 0.1)
    assert again.worker is first.worker and again.decision.cached == 900
    other = router.route(Query(2, pack(range(1000)), salt=b"other tenant"), 0.2)
    assert other.decision.cached == 0


def test_a_policy_that_comes_back_still_settles_its_tickets() -> None:
    """A switch away and back long after the start, with a request in flight throughout."""
    policy = make_policy("lbgr", rng=Random(0))
    router = Router(policy)
    router.add_worker("a")
    first = router.route(Query(0, pack(range(1000))), 3000.0)
    router.set_policy(make_policy("random", rng=Random(0)), 3000.0)
    router.set_policy(policy, 3000.1)
    second = router.route(Query(1, pack(range(5000, 9000))), 3000.1)
    router.complete(first, Outcome(), 3001.0)
    assert router.worker("a").load > 1, "the second query's reservation stays"
    router.complete(second, Outcome(), 3002.0)
    assert router.worker("a").load == 0


def test_a_restore_leaves_reservations_alone() -> None:
    policy = make_policy("lbgr", rng=Random(0))
    router = Router(policy)
    router.add_worker("a")
    first = router.route(Query(0, pack(range(1000))), 5.0)
    policy.restore(policy.snapshot())
    router.route(Query(1, pack(range(5000, 9000))), 5.0)
    router.complete(first, Outcome(), 5.0)
    assert router.worker("a").load == pytest.approx(4.32)


def test_an_old_ticket_takes_nothing_from_a_worker_that_came_back() -> None:
    for name in ("lbgr_paper", "lbgr_reference"):
        policy = make_policy(name, rng=Random(0))
        router = Router(policy)
        router.add_worker("a")
        old = router.route(Query(0, pack(range(4000))), 0.0)
        router.remove_worker("a", 0.0)
        router.add_worker("a", 0.0)
        router.route(Query(1, pack(range(9000, 13000))), 0.0)
        reserved = policy._workers["a"].load  # type: ignore[attr-defined]
        router.complete(old, Outcome(Status.FAILED), 0.0)
        assert policy._workers["a"].load == reserved > 0, name  # type: ignore[attr-defined]
