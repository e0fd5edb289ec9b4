"""The picker's decisions without any wire format, and its flow control against a slow model of it."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools")

from kvist.gateway.admission import Admission
from kvist.picker.core import Picker
from kvist.picker.flight import Asked, Flight, Refused
from kvist.picker.protocol import endpoint, in_subset, place_of, subset, url_of
from kvist.picker.settings import build
from kvist.prefix.index import PrefixIndex
from kvist.routing import Router, Status, make_policy


class Pool:
    """Endpoints a, b, c, …; `down` ones are not allowed."""

    def __init__(self, count: int, policy: str = "lbgr") -> None:
        self.router = Router(make_policy(policy, rng=Random(0)), index=PrefixIndex(unit=1, block_size=16))
        self.places = [f"10.0.0.{i}:8000" for i in range(1, count + 1)]
        for place in self.places:
            self.router.add_worker(url_of(place))
        self.down: set[str] = set()
        self.models: frozenset[str] = frozenset()
        self.full = False
        self.told: list[tuple[str, str]] = []

    def allowed(self, model: str, now: float) -> Collection[str]:
        return [url_of(place) for place in self.places if place not in self.down]

    def serves(self, model: str) -> bool:
        return not self.models or model in self.models

    def saturated(self, model: str, now: float) -> bool:
        return self.full

    def sent(self, url: str, now: float) -> None:
        self.told.append(("sent", url))

    def succeeded(self, url: str) -> None:
        self.told.append(("succeeded", url))

    def failed(self, url: str, now: float) -> None:
        self.told.append(("failed", url))

    def released(self, url: str) -> None:
        self.told.append(("released", url))

    def at_rest(self) -> bool:
        return all(
            w.in_flight == w.in_flight_tokens == w.pending_prefill == 0 and abs(w.load) < 1e-9
            for w in self.router.workers
        )


def make(count: int = 3, policy: str = "lbgr", **options: object) -> tuple[Picker, Pool]:
    pool = Pool(count, policy)
    return Picker(build(options, "test"), pool, lambda: 99.0), pool


def chat(text: str, more: str = "") -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"%s"}]%s}' % (text.encode(), more.encode())


def ask(picker: Picker, text: str = "hello", now: float = 0.0, more: str = "", **fields: object) -> Flight:
    asked = Asked("/v1/chat/completions", body=chat(text, more), **fields)  # type: ignore[arg-type]
    return picker.ask(asked, now)


def test_the_same_prefix_goes_to_the_same_endpoint() -> None:
    picker, pool = make(4)
    homes = {}
    for turn in range(6):
        for group in range(4):
            flight = ask(picker, f"group {group} " + "shared text " * 200 + f"turn {turn}", now=float(turn))
            homes.setdefault(group, set()).add(flight.places[0])
            picker.answered(flight, 200, flight.places[0], turn + 0.1)
            picker.end(flight, Status.OK, b"", turn + 0.2)
    assert all(len(places) == 1 for places in homes.values())
    assert pool.at_rest()


def test_the_list_of_endpoints_is_in_order_of_score_without_repeats() -> None:
    picker, pool = make(5, "least_load", fallbacks=3)
    for place, busy in zip(pool.places, (3, 1, 0, 2, 4), strict=True):
        pool.router.worker(url_of(place)).in_flight = busy
    flight = ask(picker)
    assert flight.places == tuple(pool.places[i] for i in (2, 1, 3, 0))
    assert len(ask(picker).places) == 4
    picker, _ = make(5, "least_load", fallbacks=0)
    assert len(ask(picker).places) == 1


def test_only_endpoints_that_are_well_and_in_the_subset() -> None:
    picker, pool = make(4)
    pool.down = {pool.places[0]}
    for wanted in (subset([f"{pool.places[0]},{pool.places[2]}"]), subset(["10.0.0.1", "10.0.0.3"])):
        for _ in range(5):
            assert ask(picker, subset=wanted).places == (pool.places[2],)
    for wanted in (frozenset(), subset([pool.places[0]]), subset(["10.9.9.9:1"])):
        with pytest.raises(Refused) as refused:
            ask(picker, subset=wanted)
        assert refused.value.status == 503


def test_no_endpoint_is_503_for_prompts_and_others() -> None:
    picker, pool = make(2)
    pool.down = set(pool.places)
    for path in ("/v1/chat/completions", "/v1/models"):
        with pytest.raises(Refused) as refused:
            picker.ask(Asked(path, body=chat("x")), 0.0)
        assert refused.value.status == 503 and refused.value.retry_after
    assert pool.at_rest()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"m"}', b"\xff", b'{"messages":1,"model":2}'])
def test_a_body_without_a_prompt_is_400(body: bytes) -> None:
    picker, _ = make()
    with pytest.raises(Refused) as refused:
        picker.ask(Asked("/v1/chat/completions", body=body), 0.0)
    assert refused.value.status == 400
    assert picker.metrics.refused["400"] == 1


def test_an_unknown_model_is_404() -> None:
    picker, pool = make()
    pool.models = frozenset({"other"})
    with pytest.raises(Refused) as refused:
        ask(picker)
    assert refused.value.status == 404


def test_requests_without_a_prompt_go_to_the_idlest_and_count_nowhere() -> None:
    picker, pool = make(3)
    pool.router.worker(url_of(pool.places[0])).in_flight = 5
    flight = picker.ask(Asked("/v1/models", "GET"), 0.0)
    assert flight.places[0] != pool.places[0]
    picker.answered(flight, 200, flight.places[0], 0.1)
    picker.end(flight, Status.OK, b"", 0.1)
    assert pool.told == [] and picker.admission.active == 0


def test_usage_and_times_are_learned() -> None:
    picker, pool = make(1)
    flight = ask(picker, "word " * 100, now=1.0, more=',"stream":true')
    picker.answered(flight, 200, "", 1.5)
    picker.first_data(flight, 1.5)
    assert pool.router.worker(url_of(pool.places[0])).pending_prefill == 0
    tail = (
        b'data: {"usage":{"prompt_tokens":100,"completion_tokens":7,'
        b'"prompt_tokens_details":{"cached_tokens":60}}}'
    )
    picker.end(flight, Status.OK, tail, 3.0)
    own = picker.metrics.worker(url_of(pool.places[0]))
    assert (own.cached_true, own.prompt_true, own.outcomes["ok"]) == (60, 100, 1)
    assert own.ttft.total == pytest.approx(0.5) and own.latency.total == pytest.approx(2.0)
    assert pool.told == [("sent", url_of(pool.places[0])), ("succeeded", url_of(pool.places[0]))]


def test_a_stream_without_usage_teaches_its_length_by_its_events() -> None:
    picker, _ = make(1)
    flight = ask(picker, more=',"stream":true')
    picker.answered(flight, 200, "", 0.1)
    picker.first_data(flight, 0.1)
    flight.events = 12
    picker.end(flight, Status.OK, b"data: [DONE]\n\n", 2.1)
    ticket = ask(picker).ticket
    assert ticket is not None and ticket.decision.predicted is not None
    assert ticket.decision.predicted > 0.5, "2 s for 10 tokens, most of it decoding"


def test_a_fallback_that_served_has_the_request_and_the_chosen_one_the_failure() -> None:
    picker, pool = make(3)
    flight = ask(picker)
    chosen, served = flight.places[:2]
    picker.answered(flight, 200, served, 0.5)
    workers = {place_of(w.id): w.in_flight for w in pool.router.workers}
    assert workers[served] == 1 and workers[chosen] == 0
    assert ("failed", url_of(chosen)) in pool.told
    picker.end(flight, Status.OK, b"", 1.0)
    assert picker.metrics.worker(url_of(served)).outcomes["ok"] == 1
    assert picker.metrics.worker(url_of(chosen)).outcomes["failed"] == 1
    assert pool.at_rest()


def test_an_answer_after_the_end_reserves_nothing() -> None:
    picker, pool = make(3)
    flight = ask(picker)
    picker.end(flight, Status.OK, b"", 0.1)
    picker.answered(flight, 200, flight.places[1], 0.2)
    assert pool.at_rest() and picker.admission.active == 0


def test_served_by_a_stranger_gives_the_reservation_back() -> None:
    picker, pool = make(2)
    flight = ask(picker)
    picker.answered(flight, 200, "10.9.9.9:1", 0.5)
    picker.end(flight, Status.OK, b"", 1.0)
    assert pool.at_rest() and picker.admission.active == 0


def test_errors_count_as_failures_and_a_lost_client_says_nothing_of_the_endpoint() -> None:
    picker, pool = make(1)
    url = url_of(pool.places[0])
    for status, whole, told in (
        (500, Status.OK, "failed"),
        (400, Status.OK, "succeeded"),
        (200, Status.CANCELLED, "released"),
    ):
        flight = ask(picker)
        picker.answered(flight, status, "", 0.1)
        picker.end(flight, whole, b"", 0.2)
        assert pool.told[-1] == (told, url)
    assert picker.metrics.worker(url).outcomes == {"failed": 2, "cancelled": 1}
    assert pool.at_rest()


def test_a_saturated_pool_sheds_the_sheddable_and_lets_the_others_wait() -> None:
    picker, pool = make(1, max_in_flight=2, queue_size=2, objectives={"batch": -1, "chat": 5})
    first, second = ask(picker), ask(picker, objective="batch")
    with pytest.raises(Refused) as refused:
        ask(picker, objective="batch")
    assert refused.value.status == 429 and refused.value.retry_after
    settled = []
    low, high = ask(picker), ask(picker, objective="chat")
    for flight in (low, high):
        flight.settle = lambda flight=flight: settled.append(flight)
        assert flight.waiting and not flight.places
    with pytest.raises(Refused) as refused:
        ask(picker)
    assert refused.value.status == 429
    picker.end(first, Status.OK, b"", 1.0)
    assert settled == [high] and high.places
    picker.end(second, Status.OK, b"", 1.0)
    assert settled == [high, low]
    for flight in (high, low):
        picker.end(flight, Status.OK, b"", 2.0)
    assert pool.at_rest() and picker.admission.active == picker.admission.waiting == 0


def test_a_pool_that_says_it_has_enough_sheds_the_sheddable_only() -> None:
    picker, pool = make(1, objectives={"batch": -1})
    pool.full = True
    assert ask(picker).places
    with pytest.raises(Refused) as refused:
        ask(picker, objective="batch")
    assert refused.value.status == 429
    pool.full = False
    assert ask(picker, objective="batch").places


def test_waiting_ends_with_429_or_with_the_client() -> None:
    picker, pool = make(1, max_in_flight=1, queue_timeout=5.0)
    first, late, gone = ask(picker), ask(picker), ask(picker)
    picker.end(gone, Status.CANCELLED, b"", 1.0)
    assert picker.admission.waiting == 1
    picker.sweep(4.9)
    assert late.waiting
    picker.sweep(5.0)
    assert late.refused is not None and late.refused.status == 429
    picker.end(late, Status.CANCELLED, b"", 5.0)
    picker.end(first, Status.OK, b"", 6.0)
    assert pool.at_rest() and picker.admission.active == picker.admission.waiting == 0


def test_more_endpoints_make_more_room() -> None:
    picker, pool = make(2, max_in_flight=1)
    pool.down = {pool.places[1]}
    ask(picker)
    waiting = ask(picker)
    assert waiting.waiting
    pool.down = set()
    picker.sweep(1.0)
    assert not waiting.waiting and waiting.places[0] in pool.places


@pytest.mark.parametrize(
    "text", ["", "x", "1.2.3.4", "1.2.3.4:", ":80", "1.2.3.4:0", "1.2.3.4:65536", "::1:80"]
)
def test_malformed_endpoints_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        endpoint(text)


def test_endpoints_and_subsets() -> None:
    assert endpoint(" 10.0.0.1:80 ") == "10.0.0.1:80"
    assert endpoint("[2600::1]:80") == "[2600::1]:80"
    assert in_subset("[2600::1]:80", subset(["2600::1"]))
    assert not in_subset("10.0.0.1:80", subset(["10.0.0.1:81"]))
    with pytest.raises(ValueError, match="exclude each other"):
        build({"endpoints": ["1.2.3.4:5"], "pool_name": "x"}, "test")
    with pytest.raises(ValueError, match="fallbacks"):
        build({"fallbacks": -1}, "test")


class SlowFlow:
    """What Admission means, by looking at everything each time."""

    def __init__(self, most: int, queue: int, timeout: float) -> None:
        self.most, self.queue, self.timeout = most, queue, timeout
        self.active = 0
        self.line: list[tuple[int, str, float, int]] = []  # priority, flow, deadline, number
        self.turns: dict[int, list[str]] = {}  # by priority: whose turn comes first

    def next(self) -> int:
        top = max(priority for priority, *_ in self.line)
        flow = self.turns[top].pop(0)
        entry = next(e for e in self.line if e[0] == top and e[1] == flow)
        self.line.remove(entry)
        if any(e[0] == top and e[1] == flow for e in self.line):
            self.turns[top].append(flow)
        return entry[3]

    def forget(self, number: int) -> None:
        priority, flow, *_ = next(e for e in self.line if e[3] == number)
        self.line = [e for e in self.line if e[3] != number]
        if not any(e[0] == priority and e[1] == flow for e in self.line):
            self.turns[priority].remove(flow)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flow_control_is_what_its_slow_model_is(data: st.DataObject) -> None:
    most = data.draw(st.integers(1, 3))
    fast, slow = Admission(most, 4, 10.0), SlowFlow(most, 4, 10.0)
    now, number = 0.0, 0
    started: list[int] = []
    refused: list[int] = []
    entries = {}
    for _ in range(data.draw(st.integers(1, 40))):
        step = data.draw(st.sampled_from(["come", "come", "leave", "cancel", "time"]))
        if step == "come":
            number += 1
            priority, flow = data.draw(st.integers(-1, 1)), data.draw(st.sampled_from("ab"))
            if slow.active < slow.most and not slow.line:
                assert fast.enter()
                slow.active += 1
                continue
            assert not fast.enter()
            mine = number
            entry = fast.wait(
                priority,
                flow,
                now,
                lambda mine=mine: started.append(mine),
                lambda mine=mine: refused.append(mine),
            )
            assert (entry is None) == (len(slow.line) >= slow.queue)
            if entry is not None:
                entries[mine] = entry
                if not any(e[0] == priority and e[1] == flow for e in slow.line):
                    slow.turns.setdefault(priority, []).append(flow)
                slow.line.append((priority, flow, now + slow.timeout, mine))
        elif step == "leave" and slow.active:
            fast.leave()
            slow.active -= 1
            expected = []
            while slow.line and slow.active < slow.most:
                expected.append(slow.next())
                slow.active += 1
            assert started == expected
            started.clear()
        elif step == "cancel" and slow.line:
            mine = data.draw(st.sampled_from([e[3] for e in slow.line]))
            fast.cancel(entries[mine])
            slow.forget(mine)
            fast.sweep(now)  # forgets the flow's place in the turns, as the model does at once
        elif step == "time":
            now += data.draw(st.sampled_from([1.0, 5.0, 11.0]))
            fast.sweep(now)
            due = [e[3] for e in slow.line if e[2] <= now]
            for mine in due:
                slow.forget(mine)
            assert sorted(refused) == due
            refused.clear()
        assert (fast.active, fast.waiting) == (slow.active, len(slow.line))


def test_tokens_that_come_later_let_the_request_wait() -> None:
    """A long prompt is made into token ids in a thread; the client may be gone when they come."""
    picker, pool = make(1, max_in_flight=1)
    calls: list = []
    picker.prepare = lambda query, kind, body, raw, done: calls.append((kind, done))
    settled: list[Flight] = []
    first, second = ask(picker), ask(picker)
    for flight in (first, second):
        flight.settle = lambda flight=flight: settled.append(flight)
    assert first.waiting and second.waiting and len(calls) == 1
    picker.end(first, Status.CANCELLED, b"", 1.0)
    assert len(calls) == 2 and not settled  # the second has the place, and waits for its tokens
    calls[0][1](True)
    assert not first.places
    calls[1][1](True)
    assert settled == [second] and second.places == tuple(pool.places)
    picker.end(second, Status.OK, b'{"usage":{"prompt_tokens":9,"cached_tokens":1}}', 2.0)
    assert picker.metrics.token_counts[False] == 1
    picker.prepare = lambda query, kind, body, raw, done: done(True)
    assert ask(picker).places
