"""What gateways tell each other: a join of shares, counters of everybody's load, the effect in simulation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.gateway.sharing.fleet import SharedFleet
from kvist.gateway.sharing.redis import observations
from kvist.gateway.sharing.share import (
    MOST_BYTES,
    MOST_PEERS,
    Peers,
    Share,
    WorkerShare,
    decode,
    encode,
)
from kvist.gateway.sharing.simulate import Gateways, simulate
from kvist.model import Query, pack
from kvist.routing import ROUTERS, Outcome, Router, Status, Ticket, make_policy
from kvist.sim import SimConfig
from kvist.sim import simulate as simulate_one
from kvist.workloads import make_workload

shares = st.builds(
    Share,
    gateway=st.sampled_from(["me", "a", "b", "c"]),
    epoch=st.integers(0, 2),
    sequence=st.integers(0, 4),
    policy=st.sampled_from(["lbgr", "other"]),
    workers=st.dictionaries(
        st.sampled_from(["w0", "w1"]),
        st.builds(
            WorkerShare,
            st.integers(0, 9),
            st.integers(0, 99),
            st.integers(0, 9),
            st.integers(0, 99),
            st.floats(0, 9, width=16),
        ),
    ),
)


def once(messages: list[Share]) -> list[Share]:
    """A gateway says one thing under one (epoch, sequence)."""
    found: dict[tuple[str, int, int], Share] = {}
    for share in messages:
        found.setdefault((share.gateway, *share.age), share)
    return list(found.values())


@given(messages=st.lists(shares, max_size=12), seed=st.integers(0, 99))
def test_order_and_repetition_do_not_matter(messages: list[Share], seed: int) -> None:
    messages = once(messages)
    expected: Counter[str] = Counter()
    newest: dict[str, Share] = {}
    for share in messages:
        if share.gateway != "me" and share.age >= newest.get(share.gateway, share).age:
            newest[share.gateway] = share
    for share in newest.values():
        for worker, part in share.workers.items():
            expected[worker] += part.in_flight
    again = [*messages, *messages]
    Random(seed).shuffle(again)
    peers = Peers("me", 1.0)
    for share in again:
        peers.receive([share], 0.0)
    assert {w: p.in_flight for w, p in peers.total("lbgr", 0.0).items()} == dict(expected)
    loads = sum(p.load for share in newest.values() if share.policy == "lbgr" for p in share.workers.values())
    assert sum(p.load for p in peers.total("lbgr", 0.0).values()) == pytest.approx(loads)
    assert peers.total("lbgr", 1.1) == {}


def test_a_share_seen_again_is_no_fresher_and_a_restart_is() -> None:
    peers = Peers("me", 1.0)
    old = Share("a", 1, 9, "lbgr", {"w": WorkerShare(3)})
    peers.receive([old], 0.0)
    peers.receive([old], 0.9)
    assert peers.total("lbgr", 1.5) == {}
    peers.receive([Share("a", 2, 1, "lbgr", {"w": WorkerShare(1)})], 1.6)
    peers.receive([old], 1.7)
    assert peers.total("lbgr", 1.7)["w"].in_flight == 1


def test_what_cannot_be_read_is_left_out() -> None:
    good = Share("a", 1, 1, "lbgr", {"w": WorkerShare(1, 2, 1, 3, 4.0)})
    assert decode(encode(good)) == good
    for bad in (
        b"",
        b"\xff" * 40,
        encode(good)[:-3],
        encode(msgspec.structs.replace(good, version=2)),
        encode(msgspec.structs.replace(good, workers={"w": WorkerShare(-1)})),
        encode(msgspec.structs.replace(good, workers={"w": WorkerShare(load=float("nan"))})),
        encode(msgspec.structs.replace(good, policy="x" * MOST_BYTES)),
        msgspec.msgpack.encode({"gateway": "a"}),
    ):
        assert decode(bad) is None


@given(data=st.binary(max_size=200))
def test_any_bytes_can_be_refused(data: bytes) -> None:
    share = decode(data)
    assert share is None or share.version == 1


def test_the_number_of_peers_is_bounded() -> None:
    peers = Peers("me", 10.0)
    for i in range(3 * MOST_PEERS):
        peers.receive([Share(f"g{i}", 1, 1, "lbgr", {"w": WorkerShare(1)})], i * 0.01)
    assert len(peers.fresh(2.0)) == MOST_PEERS
    assert peers.total("lbgr", 2.0)["w"].in_flight == MOST_PEERS


steps = st.lists(
    st.tuples(
        st.sampled_from(["route", "route", "route", "first", "end", "tell", "hear", "leave", "join", "wait"]),
        st.integers(0, 60),
        st.floats(0, 0.4),
    ),
    max_size=80,
)


@pytest.mark.parametrize("policy", sorted(ROUTERS))
@settings(max_examples=40, deadline=None)
@given(ops=steps)
def test_counters_are_ones_own_requests_and_what_fresh_peers_told(
    policy: str, ops: list[tuple[str, int, float]]
) -> None:
    """Oracle: the sets of tickets under way, and each gateway's last told and last heard counts."""
    fresh_for = 1.0
    fleets = []
    for g in range(3):
        router = Router(make_policy(policy, rng=Random(g)))
        for i in range(3):
            router.add_worker(f"w{i}")
        fleets.append(SharedFleet(router, f"g{g}", 1, fresh_for))
    flying: list[list[Ticket]] = [[] for _ in fleets]
    told: dict[int, tuple[Share, Counter[str]]] = {}
    heard: list[dict[int, tuple[Counter[str], float]]] = [{} for _ in fleets]
    shown: list[Counter[str]] = [Counter() for _ in fleets]
    now = 0.0
    for op, number, wait in ops:
        now += wait
        g = number % len(fleets)
        router, mine = fleets[g].router, flying[g]
        here = [state.id for state in router.workers]
        if op == "route":
            mine.append(router.route(Query(number, pack(range(number, 3 * number + 2))), now))
        elif op == "first" and mine:
            router.first_token(mine[number % len(mine)], now)
        elif op == "end" and mine:
            router.complete(mine.pop(number % len(mine)), Outcome(list(Status)[number % 3]), now)
        elif op == "leave" and len(here) > 1:
            gone = here[number % len(here)]
            router.remove_worker(gone, now)
            shown[g].pop(gone, None)
        elif op == "join" and len(here) < 3:
            router.add_worker(next(f"w{i}" for i in range(3) if f"w{i}" not in here), now)
        elif op == "tell":
            share = fleets[g].own()
            own = Counter(t.worker.id for t in mine if t.worker.slot >= 0)
            assert {w: p.in_flight for w, p in share.workers.items() if p.in_flight} == dict(own)
            told[g] = decode(encode(share)) or share, own
        elif op == "hear":
            for other, (share, own) in told.items():
                if other != g and heard[g].get(other, (None, 0.0))[0] is not own:
                    heard[g][other] = own, now
                fleets[g].peers.receive([share], now)
            fleets[g].refresh(now)
            fresh = [own for own, seen in heard[g].values() if now - seen <= fresh_for]
            known = {state.id for state in router.workers}
            shown[g] = Counter()
            for own in fresh:
                shown[g].update({w: n for w, n in own.items() if w in known})
        for i, fleet in enumerate(fleets):
            for state in fleet.router.workers:
                own_now = sum(t.worker is state for t in flying[i])
                assert state.in_flight == own_now + shown[i][state.id]
                assert 0 <= state.waiting <= state.in_flight
                assert state.pending_prefill >= 0 and state.load_elsewhere >= 0
    for i, fleet in enumerate(fleets):
        for ticket in flying[i]:
            fleet.router.complete(ticket, Outcome(Status.CANCELLED), now)
        fleet.refresh(now + 2 * fresh_for)
        for state in fleet.router.workers:
            assert state.in_flight == state.in_flight_tokens == state.waiting == state.pending_prefill == 0
            assert state.load_elsewhere == 0


def test_lbgr_goes_round_what_others_have_loaded() -> None:
    router = Router(make_policy("lbgr", rng=Random(1)))
    for name in ("w0", "w1"):
        router.add_worker(name)
    fleet = SharedFleet(router, "me", 1, 1.0)
    busy = WorkerShare(6, 24_000, 5, 20_000, 20.0)
    fleet.peers.receive([Share("a", 1, 1, "lbgr", {"w0": busy})], 0.0)
    fleet.refresh(0.0)
    chosen = [router.route(Query(i, pack(range(i * 500, i * 500 + 400))), 0.01 * i) for i in range(6)]
    assert {ticket.worker.id for ticket in chosen} == {"w1"}


def test_observations_are_found_at_any_depth() -> None:
    one = {"w": {"observations": 3, "theta": [1]}, "v": {"observations": 4}}
    assert observations(one) == 7
    assert observations({"version": 2, "workers": one}) == 7
    assert observations(None) == observations({}) == 0


def queries(seed: int = 1) -> object:
    return make_workload("gsp:groups=64,prompts=24", rate=18, seed=seed)


CONFIG = SimConfig(workers=6, kv_tokens=60_000, block_size=16, seed=3, kv_events=True)


def test_one_gateway_is_the_simulator_itself_bit_for_bit() -> None:
    for interval in (None, 0.5):
        assert simulate(queries(), CONFIG, Gateways(1, interval)) == simulate_one(queries(), CONFIG)  # type: ignore[arg-type]


def test_sharing_helps_gateways_that_see_the_same_caches() -> None:
    alone = simulate(queries(), CONFIG, Gateways(4))  # type: ignore[arg-type]
    shared = simulate(queries(), CONFIG, Gateways(4, 0.05))  # type: ignore[arg-type]
    assert shared == simulate(queries(), CONFIG, Gateways(4, 0.05))  # type: ignore[arg-type]
    assert alone.completed == shared.completed == 64 * 24
    assert shared.ttft.mean < 0.9 * alone.ttft.mean


def test_a_session_that_keeps_to_one_gateway_keeps_its_prefix() -> None:
    config = replace(CONFIG, kv_events=False)
    spread = simulate(queries(), config, Gateways(4))  # type: ignore[arg-type]
    sticky = simulate(queries(), config, Gateways(4, sticky=True))  # type: ignore[arg-type]
    assert sticky.hit_rate > spread.hit_rate + 0.03


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="gateways must be at least 1"):
        Gateways(0)
    with pytest.raises(ValueError, match="interval must be above 0"):
        Gateways(2, 0.0)
    with pytest.raises(ValueError, match="fresh_for"):
        Peers("a", 0.0)
