"""LBGR: its queue against brute force, what it learns, what it stands, what it gives back."""

from __future__ import annotations

import json
from math import inf, isfinite, nan
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.model import Query, pack
from kvist.routing import Outcome, Router, Status, Ticket, make_policy
from kvist.routing.lbgr import LBGR
from kvist.routing.lbgr.output import OutputLengths
from kvist.routing.lbgr.price import delayed
from kvist.routing.lbgr.queue import STEP, PrefillQueue, prefill_work


class FluidServer:
    """Serves works in order at a fixed pace; the truth that a PrefillQueue follows from the outside."""

    def __init__(self, pace: float) -> None:
        self.pace = pace
        self.ends: list[tuple[int, float, float]] = []  # key, work, time of its first token

    def add(self, key: int, work: float, now: float) -> None:
        start = max(now, self.ends[-1][2]) if self.ends else now
        self.ends.append((key, work, start + work * self.pace))

    def left(self, now: float) -> float:
        work = 0.0
        for _, each, end in self.ends:
            work += min(max((end - now) / self.pace, 0.0), each)
        return work


@settings(max_examples=200, deadline=None)
@given(
    pace=st.floats(1e-5, 1e-3),
    arrivals=st.lists(st.tuples(st.floats(0, 2), st.floats(1, 20000)), min_size=1, max_size=30),
    looks=st.lists(st.floats(0, 40), max_size=20),
)
def test_the_queue_knows_the_work_left_at_a_server_of_known_pace(
    pace: float, arrivals: list[tuple[float, float]], looks: list[float]
) -> None:
    server, queue, now = FluidServer(pace), PrefillQueue(0.0), 0.0
    events: list[tuple[float, int, int]] = []
    for key, (gap, work) in enumerate(arrivals):
        now += gap
        server.add(key, work, now)
        events.append((now, 1, key))
        events.append((server.ends[-1][2], 0, key))
    events += [(time, 2, -1) for time in looks]
    for time, kind, key in sorted(events):
        if kind == 0:
            queue.remove(key, time, pace, computed=True)
        elif kind == 1:
            queue.add(key, arrivals[key][1], time)
        else:
            truth = sum(
                min(max((end - time) / pace, 0.0), work) for k, work, end in server.ends if k in queue._work
            )
            left, late = queue.look(time, pace)
            assert left == pytest.approx(truth, abs=1e-3 + 1e-6 * truth)
            assert late == pytest.approx(0.0, abs=1e-6)
    assert len(queue) == 0 and queue.look(now + 100, pace) == (0.0, 0.0)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "first", "fail", "look"]),
            st.integers(0, 8),
            st.floats(0, 5),
            st.floats(1e-6, 1.0),
        ),
        max_size=60,
    ),
    streams=st.sampled_from([0.0, 1.0]),
)
def test_the_queue_is_never_negative_and_its_total_is_the_sum(
    steps: list[tuple[str, int, float, float]], streams: float
) -> None:
    queue, now, known = PrefillQueue(0.0), 0.0, {}
    queue.streams = streams
    for what, key, gap, pace in steps:
        now += gap
        if what == "add" and key not in known:
            known[key] = 100.0 * (key + 1)
            queue.add(key, known[key], now)
        elif what in ("first", "fail"):
            known.pop(key, None)
            queue.remove(key, now, pace, computed=what == "first")
        assert queue.total == pytest.approx(sum(known.values()))
        left, late = queue.look(now, pace)
        assert 0.0 <= left <= queue.total + 1e-9
        assert late >= 0.0


def test_a_stalled_worker_keeps_its_queue_and_is_overdue() -> None:
    queue = PrefillQueue(0.0)
    for key in range(5):
        queue.add(key, 4000.0, 0.0)
    left, late = queue.look(100.0, 1e-4)
    assert left == 16000.0
    assert late == pytest.approx(100.0 - 0.4)
    assert queue.look(100.0, 1e-4, 2.0)[1] == pytest.approx(100.0 - 2.4), "a first token takes 2 s more"
    assert queue.look(1.0, 1e-4, 2.0) == (16000.0, 0.0)
    queue.streams = 0.0  # it never tells of first tokens: the pace is all there is
    assert queue.look(100.0, 1e-4) == (0.0, 0.0)


def test_several_prompts_fit_one_step() -> None:
    queue = PrefillQueue(0.0)
    for key in range(10):
        queue.add(key, 400.0, 0.0)
    assert queue.look(0.5, 1e-4)[0] == pytest.approx(4000 - STEP)
    queue = PrefillQueue(0.0)
    for key in range(3):
        queue.add(key, 400.0, 0.0)
    assert queue.look(1.0, 1e-4) == (0.0, pytest.approx(1.0 - 0.12)), "one step for all, and that is over"


def test_work_has_the_quadratic_term_of_attention() -> None:
    assert prefill_work(0, 1000) == pytest.approx(1020)
    assert prefill_work(10_000, 1000) == pytest.approx(1420)
    assert prefill_work(0, 100_000) == pytest.approx(300_000)


@pytest.mark.parametrize("elsewhere", [0.0, 20.0, 500.0])
def test_what_waits_for_another_gateways_requests_is_counted_once(elsewhere: float) -> None:
    """A first token that is overdue waits for work that other gateways have told of: not for both."""
    told = {}
    for overdue in (False, True):
        router = Router(make_policy("lbgr", rng=Random(0)))
        worker = router.add_worker("a")
        if overdue:
            router.route(Query(0, pack(range(400))), 0.0)
        worker.load_elsewhere = elsewhere
        told[overdue] = router.route(Query(1, pack(range(1000, 1400))), 10.0).decision.predicted_ttft
    assert told[False] is not None and told[True] is not None
    late = 10.0 - 0.02 - 0.08 * 0.4032  # by the prior: its fixed part and its work
    assert told[True] - told[False] == pytest.approx(max(late - 0.08 * elsewhere, 0.0), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100)), min_size=1, max_size=20))
def test_the_price_lies_between_nobody_and_the_mean_queue(workers: list[tuple[int, float]]) -> None:
    waiting, wait = [w for w, _ in workers], [t for _, t in workers]
    many = delayed(waiting, wait)
    assert 0.0 <= many <= sum(waiting) / len(waiting) + 1e-9
    assert delayed([*waiting, 0], [*wait, 0.0]) == 0.0, "a free worker as good as any: nobody is delayed"


class Cluster:
    """Workers that serve one query at a time, in order, and stream; service is linear in uncached tokens."""

    def __init__(self, slopes: dict[str, float], **params: object) -> None:
        self.router = Router(make_policy("lbgr", rng=Random(0), **params))
        self.slopes = slopes
        self.free = dict.fromkeys(slopes, 0.0)
        self.cached: dict[str, set[int]] = {name: set() for name in slopes}
        self.flying: list[tuple[float, int, Ticket]] = []
        self.count = dict.fromkeys(slopes, 0)
        self.errors: list[float] = []
        self.streams = True
        for name in slopes:
            self.router.add_worker(name)

    def send(self, now: float, number: int, group: int) -> None:
        for end, _, ticket in sorted(self.flying, key=lambda item: item[:2]):
            if end <= now:
                if self.streams:
                    self.router.first_token(ticket, end)
                self.router.complete(ticket, Outcome(), end)
                told = ticket.decision.predicted
                assert told is not None
                self.errors.append(abs(told - (end - ticket.routed_at)) / (end - ticket.routed_at))
        self.flying = [item for item in self.flying if item[0] > now]
        shared = pack([group] * 1000)
        ticket = self.router.route(Query(number, shared + pack([9000 + number] * 500)), now)
        name = ticket.worker.id
        tokens = 500 if group in self.cached[name] else 1500
        self.cached[name].add(group)
        self.free[name] = max(self.free[name], now) + self.slopes[name] * tokens / 1000 + 0.01
        self.count[name] += 1
        self.flying.append((self.free[name], number, ticket))

    def run(self, count: int, rate: float, groups: int, seed: int, now: float = 0.0) -> float:
        rng = Random(seed)
        for number in range(count):
            now += rng.expovariate(rate)
            self.send(now, number, rng.randrange(groups))
        return now


@pytest.mark.parametrize("streams", [True, False])
def test_predictions_come_true(streams: bool) -> None:
    cluster = Cluster({"a": 0.1, "b": 0.1, "c": 0.4})
    cluster.streams = streams
    cluster.run(800, 12.0, 12, 4)
    late = sorted(cluster.errors[400:])
    assert late[len(late) // 2] < 0.1
    assert cluster.count["a"] > 2 * cluster.count["c"] > 0
    health = cluster.router.policy.health()
    assert health["c"]["pace"] > 1.5 * health["a"]["pace"]
    assert all(0.7 < health[name]["drift"] < 1.4 for name in "abc")


def test_equal_workers_share_a_burst() -> None:
    cluster = Cluster(dict.fromkeys("abcd", 0.2))
    cluster.run(400, 14.0, 400, 5)
    assert max(cluster.count.values()) < 1.3 * min(cluster.count.values())


def test_the_price_keeps_prefixes_together() -> None:
    """Under load fewer workers compute the same prefix than without it."""
    copies = {}
    for congestion in (0.0, 1.0):
        copies[congestion] = 0
        for seed in range(4):
            cluster = Cluster(dict.fromkeys("abc", 0.2), congestion=congestion)
            cluster.run(600, 30.0, 30, seed)
            copies[congestion] += sum(len(groups) for groups in cluster.cached.values())
    assert copies[1.0] < 0.85 * copies[0.0]


def test_a_hot_prefix_is_copied_to_idle_workers() -> None:
    """One group for all: staying with its first worker would leave the others idle."""
    cluster = Cluster(dict.fromkeys("abcd", 0.2))
    cluster.run(600, 24.0, 1, 6)  # one worker serves 9 a second
    assert all(groups == {0} for groups in cluster.cached.values())
    assert max(cluster.count.values()) < 2 * min(cluster.count.values())


@pytest.mark.parametrize(("rate", "slow"), [(10.0, 60.0), (15.0, 60.0)])
def test_one_slow_first_answer_does_not_shut_a_worker_out(rate: float, slow: float) -> None:
    """An engine that was still warming up is asked again."""
    cluster = Cluster(dict.fromkeys("abcd", 0.2))
    ticket = cluster.router.route(Query(-1, pack(range(1500))), 0.0, allowed={"a"})
    cluster.router.complete(ticket, Outcome(latency=slow), 0.0)
    cluster.run(3000, rate, 40, 8)
    assert cluster.count["a"] > 0.08 * 3000, "a fair share would be a quarter"


def test_a_straggler_is_left_and_taken_back() -> None:
    cluster = Cluster(dict.fromkeys("abcd", 0.1))
    now = cluster.run(600, 20.0, 40, 9)
    before = dict(cluster.count)
    cluster.slopes["a"] = 1.0
    now = cluster.run(1000, 20.0, 40, 10, now)
    slow = cluster.count["a"] - before["a"]
    cluster.slopes["a"] = 0.1
    cluster.run(3000, 20.0, 40, 11, now)
    assert slow < 0.12 * 1000
    assert cluster.count["a"] - before["a"] - slow > 0.12 * 3000


def test_a_new_worker_starts_from_what_its_fellows_know_and_is_tried() -> None:
    cluster = Cluster({"a": 0.5, "b": 0.5})
    now = cluster.run(300, 3.0, 5, 6)
    for _, _, ticket in cluster.flying:
        cluster.router.complete(ticket, Outcome(), now)
    cluster.router.add_worker("new", now)
    known = cluster.router.policy.snapshot()["workers"]
    a, b, new = (known[name]["theta"] for name in ("a", "b", "new"))  # type: ignore[index]
    assert new == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    cluster.router.route(Query(0, pack([70] * 1200)), now, {"a", "b"})
    cluster.router.route(Query(0, pack([71] * 1200)), now, {"a", "b"})
    assert cluster.router.route(Query(0, pack([7] * 1200)), now).worker.id == "new"


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["route", "first", "ok", "failed", "cancelled", "leave", "join", "drain"]),
        st.integers(0, 5),
        st.floats(0, 3),
        st.sampled_from([None, nan, inf, -1.0, 0.0, 0.3, 1e9]),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(events=EVENTS, objective=st.sampled_from(["ttft", "latency", "slo"]))
def test_reservations_are_given_back_once_whatever_happens(
    events: list[tuple[str, int, float, float | None]], objective: str
) -> None:
    policy = LBGR(objective=objective, rng=Random(0))
    router, now, tickets, number = Router(policy), 0.0, [], 0
    for name in "abc":
        router.add_worker(name, capacity=5000)
    for what, which, gap, value in events:
        now += gap
        names = [worker.id for worker in router.workers]
        if what == "route" and any(not worker.draining for worker in router.workers):
            number += 1
            ticket = router.route(Query(number, pack([which] * (200 + 900 * which))), now)
            assert all(isfinite(score) and score >= 0 for score in ticket.decision.scores)
            tickets.append(ticket)
        elif what == "first" and tickets:
            router.first_token(tickets[which % len(tickets)], now)
        elif what in ("ok", "failed", "cancelled") and tickets:
            ticket = tickets.pop(which % len(tickets))
            outcome = Outcome(Status(what), latency=value, ttft=value, output_tokens=which)
            router.complete(ticket, outcome, now)
            router.complete(ticket, outcome, now)
        elif what == "leave" and len(names) > 1:
            router.remove_worker(names[which % len(names)], now)
        elif what == "join":
            if f"n{which}" not in names:
                router.add_worker(f"n{which}", now)
        elif what == "drain":
            router.drain(names[which % len(names)], which % 2 == 0)
    for ticket in tickets:
        router.complete(ticket, Outcome(Status.FAILED), now)
    for worker in router.workers:
        own = policy._workers[worker.id]
        assert worker.waiting == worker.in_flight == worker.pending_prefill == 0
        assert len(own.queue) == 0 and own.queue.total == worker.load == 0.0
        assert all(isfinite(t) and t >= 0 for t in (*own.model.theta, *own.used, own.tpot, own.pace))


def test_failures_and_nonsense_teach_nothing() -> None:
    router = Router(make_policy("lbgr", rng=Random(0)))
    router.add_worker("a")
    before = router.policy.snapshot()
    for outcome in (
        Outcome(Status.FAILED, latency=99.0),
        Outcome(Status.CANCELLED, latency=99.0),
        Outcome(latency=nan),
        Outcome(latency=inf),
        Outcome(latency=-1.0),
    ):
        router.complete(router.route(Query(0, pack(range(50))), 0.0), outcome, 1.0)
    assert router.policy.snapshot() == before


def test_a_snapshot_survives_a_restart() -> None:
    cluster = Cluster({"a": 0.3, "b": 0.1})
    cluster.run(200, 5.0, 5, 7)
    saved = json.loads(json.dumps(cluster.router.policy.snapshot()))
    for order in ("restore first", "workers first"):
        policy = make_policy("lbgr", rng=Random(0))
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
        ({"a": {}}, "version: 3 expected"),
        ({"version": 3, "workers": []}, "workers: an object"),
        ({"version": 3, "workers": {"a": []}}, "a: an object"),
        ({"version": 3, "workers": {"a": {"theta": [1]}}}, "a.theta: 3 finite numbers"),
        ({"version": 3, "workers": {"a": {"theta": [1, 1, nan]}}}, "a.theta"),
    ],
)
def test_a_snapshot_that_does_not_fit_is_refused(state: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_policy("lbgr").restore(state)


@pytest.mark.parametrize(
    "params", [{"objective": "x"}, {"congestion": -1}, {"slo_ttft": 0}, {"forgetting": 2.0}]
)
def test_values_that_make_no_sense_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        make_policy("lbgr", **params)


def test_slo_saves_work_while_the_target_is_met() -> None:
    """A worker that holds the prefix is busy, another is free: both meet the target, so the copy is saved."""
    chosen = {}
    for objective in ("ttft", "slo"):
        cluster = Cluster(dict.fromkeys("ab", 0.1), objective=objective, slo_ttft=5.0)
        now = cluster.run(100, 2.0, 2, 3)
        router = cluster.router
        for _, _, ticket in cluster.flying:
            router.complete(ticket, Outcome(), now)
        for name in "ab":  # only a holds group 77
            router.complete(
                router.route(Query(0, pack([{"a": 77, "b": 78}[name]] * 1000)), now, {name}),
                Outcome(),
                now + 0.1,
            )
        router.route(Query(1, pack([55] * 9000)), now + 1, {"a"})  # about a second of work
        chosen[objective] = router.route(Query(2, pack([77] * 1000 + [1] * 500)), now + 1).worker.id
    assert chosen == {"ttft": "b", "slo": "a"}


def test_output_lengths_are_learned_by_shape() -> None:
    lengths = OutputLengths()
    short, long = Query(0, pack(range(100))), Query(1, pack(range(5000)))
    for _ in range(50):
        lengths.learn(short, 10)
        lengths.learn(long, 400)
    assert lengths.expect(short) == pytest.approx(10)
    assert lengths.expect(long) == pytest.approx(400)
    assert 10 < lengths.expect(Query(2, pack(range(700)), tenant="new")) < 400


def test_new_prefixes_go_to_the_emptiest_of_idle_workers() -> None:
    """One request at a time: no queue tells workers apart, yet the caches fill evenly."""
    cluster = Cluster(dict.fromkeys("abcd", 0.1))
    now = 0.0
    for number in range(200):
        now += 1.0
        cluster.send(now, number, number)
    assert max(cluster.count.values()) <= 1.2 * min(cluster.count.values())


@pytest.mark.parametrize(("rate", "learned"), [(50, 500), (2000, 200)])
def test_of_a_flood_of_answers_it_learns_from_some_and_gives_back_all(rate: int, learned: int) -> None:
    """500 answers at a real worker's pace are all learned from; of 2000 a second 100, then 50 a second."""
    policy = make_policy("lbgr", rng=Random(0))
    assert isinstance(policy, LBGR)
    router = Router(policy)
    router.add_worker("a")
    count = 500 if rate < 100 else 4000
    for i in range(count):
        now = i / rate
        ticket = router.route(Query(i, pack(range(i, i + 400))), now)
        router.complete(ticket, Outcome(Status.OK, latency=0.05), now + 0.0001)
    own = policy.health()["a"]
    assert own["answers"] == pytest.approx(learned, rel=0.05)
    assert router.worker("a").load == router.worker("a").in_flight == 0
    assert policy._fleet.answers == count
