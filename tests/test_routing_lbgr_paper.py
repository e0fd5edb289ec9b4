"""RLS, and LBGR as published: it learns each worker, stands bad observations, and reserves what it must."""

from __future__ import annotations

import json
from math import inf, isfinite, nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query, pack
from kvist.routing import Outcome, Router, Status, make_policy
from kvist.routing.lbgr_paper import LBGRPaper
from kvist.routing.rls import RecursiveLeastSquares


def model(**change: object) -> RecursiveLeastSquares:
    settings = {
        "prior": (0.1, 0.1, 0.1),
        "spread": (1.0, 1.0, 1.0),
        "bounds": ((0.0, inf),) * 3,
        "forgetting": 0.99,
        **change,
    }
    return RecursiveLeastSquares(**settings)  # type: ignore[arg-type]


def test_rls_finds_the_coefficients_of_a_line() -> None:
    rng, learner, truth = Random(1), model(), (0.5, 0.02, 1.5)
    for _ in range(600):
        x = (1.0, rng.random() * 8, rng.random() * 4)
        learner.update(x, sum(t * v for t, v in zip(truth, x, strict=True)) + rng.gauss(0, 0.02))
    assert learner.theta == pytest.approx(truth, abs=0.05)
    assert learner.error < 0.1


def test_rls_follows_a_change() -> None:
    rng, learner = Random(2), model()
    for slope in (0.2, 2.0):
        for _ in range(800):
            x = (1.0, rng.random() * 4, rng.random() * 4)
            learner.update(x, 0.1 + slope * x[2])
        assert learner.theta[2] == pytest.approx(slope, rel=0.1)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(
        st.tuples(
            st.floats(0, 1e6, allow_nan=False),
            st.floats(0, 1e6, allow_nan=False),
            st.one_of(st.floats(-1e9, 1e9), st.sampled_from([nan, inf, -inf])),
        ),
        max_size=80,
    )
)
def test_rls_stays_finite_and_within_bounds(values: list[tuple[float, float, float]]) -> None:
    learner = model()
    for a, b, y in values:
        learner.update((1.0, a, b), y)
    assert all(isfinite(t) and t >= 0 for t in learner.theta)
    assert all(isfinite(v) for row in learner.covariance for v in row)
    assert all(learner.covariance[i][i] <= 1 + 1e-9 for i in range(3))


def test_one_straggler_moves_little() -> None:
    rng, learner = Random(3), model()
    for _ in range(200):
        x = (1.0, rng.random(), rng.random())
        learner.update(x, 0.2 + 0.1 * x[1] + 0.4 * x[2] + rng.gauss(0, 0.01))
    before = learner.predict((1.0, 0.5, 0.5))
    learner.update((1.0, 0.5, 0.5), 500.0)
    assert learner.predict((1.0, 0.5, 0.5)) == pytest.approx(before, abs=0.05)


class Cluster:
    """Workers that serve one query at a time, in order; service is linear in uncached tokens."""

    def __init__(self, slopes: dict[str, float], **params: object) -> None:
        self.router = Router(make_policy("lbgr_paper", rng=Random(0), **{"congestion": 1.0, **params}))
        self.slopes = slopes
        self.free = dict.fromkeys(slopes, 0.0)
        self.cached: dict[str, set[int]] = {name: set() for name in slopes}
        self.flying: list[tuple[float, int, object]] = []
        self.count = dict.fromkeys(slopes, 0)
        for name in slopes:
            self.router.add_worker(name)

    def send(self, now: float, number: int, group: int) -> None:
        for end, _, ticket in sorted(self.flying, key=lambda item: item[:2]):
            if end <= now:
                self.router.complete(ticket, Outcome(), end)  # type: ignore[arg-type]
        self.flying = [item for item in self.flying if item[0] > now]
        shared = pack([group] * 1000)
        ticket = self.router.route(Query(number, shared + pack([9000 + number] * 500)), now)
        name = ticket.worker.id
        tokens = 500 if group in self.cached[name] else 1500
        self.cached[name].add(group)
        self.free[name] = max(self.free[name], now) + self.slopes[name] * tokens / 1000 + 0.01
        self.count[name] += 1
        self.flying.append((self.free[name], number, ticket))


def test_a_slower_worker_gets_less() -> None:
    cluster, rng, now = Cluster({"fast": 0.1, "slow": 0.4}), Random(4), 0.0
    for number in range(800):
        now += rng.expovariate(9.0)
        cluster.send(now, number, rng.randrange(12))
    assert cluster.count["fast"] > 2 * cluster.count["slow"] > 0


def test_the_congestion_price_keeps_prefixes_together() -> None:
    """Under load fewer workers compute the same prefix than without it, and the load stays even."""
    copies = {}
    for congestion in (0.0, 1.0):
        cluster, rng, now = Cluster(dict.fromkeys("abc", 0.2), congestion=congestion), Random(5), 0.0
        for number in range(600):
            now += rng.expovariate(24.0)
            cluster.send(now, number, rng.randrange(30))
        copies[congestion] = sum(len(groups) for groups in cluster.cached.values())
        assert max(cluster.count.values()) < 1.5 * min(cluster.count.values())
    assert copies[1.0] < 0.85 * copies[0.0]


def test_a_new_worker_starts_from_what_its_fellows_know() -> None:
    cluster, rng, now = Cluster({"a": 0.5, "b": 0.5}), Random(6), 0.0
    for number in range(300):
        now += rng.expovariate(3.0)
        cluster.send(now, number, rng.randrange(5))
    cluster.router.add_worker("new", now)
    known = cluster.router.policy.snapshot()
    a, b, new = (known[name]["theta"] for name in ("a", "b", "new"))  # type: ignore[index]
    assert new == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])


def test_reservations_decay_and_are_given_back() -> None:
    router = Router(make_policy("lbgr_paper", rng=Random(0)))
    worker = router.add_worker("a")
    tickets = [router.route(Query(i, pack([i] * 4000)), 0.0) for i in range(3)]
    full = worker.load
    assert full == pytest.approx(3 * 4.1)
    router.complete(tickets[0], Outcome(Status.FAILED), 0.0)
    assert worker.load == pytest.approx(full * 2 / 3)
    router.complete(tickets[1], Outcome(Status.CANCELLED), 1.0)  # one half-life later
    assert worker.load == pytest.approx(full / 3 / 2)
    router.complete(tickets[2], Outcome(), 2.0)
    assert worker.load == 0


def test_failures_and_nonsense_teach_nothing() -> None:
    router = Router(make_policy("lbgr_paper", rng=Random(0)))
    router.add_worker("a")
    before = router.policy.snapshot()["a"]
    for outcome in (
        Outcome(Status.FAILED, latency=99.0),
        Outcome(Status.CANCELLED, latency=99.0),
        Outcome(latency=nan),
        Outcome(latency=inf),
        Outcome(latency=-1.0),
    ):
        router.complete(router.route(Query(0, pack(range(50))), 0.0), outcome, 1.0)
    assert router.policy.snapshot()["a"] == before


def test_a_snapshot_survives_a_restart() -> None:
    cluster, rng, now = Cluster({"a": 0.3, "b": 0.1}), Random(7), 0.0
    for number in range(200):
        now += rng.expovariate(5.0)
        cluster.send(now, number, rng.randrange(5))
    saved = json.loads(json.dumps(cluster.router.policy.snapshot()))
    for order in ("restore first", "workers first"):
        policy = make_policy("lbgr_paper", rng=Random(0))
        router = Router(policy)
        if order == "restore first":
            policy.restore(saved)
        for name in "ab":
            router.add_worker(name)
        if order == "workers first":
            policy.restore(saved)
        assert policy.snapshot() == saved, order


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": []}, "a: an object"),
        ({"a": {"theta": [1]}}, "a.theta: 4 finite numbers"),
        ({"a": {"theta": [1, 1, 1, nan]}}, "a.theta"),
        ({"a": {"theta": [1, 1, 1, 1], "covariance": [[1]]}}, "a.covariance: 4 x 4"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(state: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_policy("lbgr_paper").restore(state)


def test_without_a_congestion_price_it_is_the_published_rule() -> None:
    """The score is then the prediction itself."""
    for congestion in (0.0, 1.0):
        policy = LBGRPaper(congestion=congestion, rng=Random(0))
        router = Router(policy)
        for name in "ab":
            router.add_worker(name)
        for i in range(6):
            ticket = router.route(Query(i, pack([i] * 3000)), 0.0)
        decision = ticket.decision
        same = decision.predicted == pytest.approx(min(decision.scores))
        assert same is (congestion == 0.0)


@pytest.mark.parametrize(("rate", "slow"), [(10.0, 60.0), (15.0, 60.0)])
def test_one_slow_first_answer_does_not_shut_a_worker_out(rate: float, slow: float) -> None:
    """An engine that was still warming up is asked again."""
    cluster, rng, now = Cluster(dict.fromkeys("abcd", 0.2)), Random(8), 0.0
    ticket = cluster.router.route(Query(-1, pack(range(1500))), now, allowed={"a"})
    cluster.router.complete(ticket, Outcome(latency=slow), now)
    for number in range(3000):
        now += rng.expovariate(rate)
        cluster.send(now, number, rng.randrange(40))
    assert cluster.count["a"] > 0.08 * 3000, "a fair share would be a quarter"
