"""Of very many workers only a shortlist is scored: who is on it, and what it changes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.model import Query, WorkerState, pack
from kvist.routing import Candidate, Outcome, Router, make_policy
from kvist.routing.shortlist import shortlist
from kvist.sim import SimConfig, simulate
from kvist.workloads import make_workload


def candidates(count: int) -> list[Candidate]:
    """Slots run against the order of joining."""
    return [Candidate(WorkerState(f"w{i}", slot=count - 1 - i), 0) for i in range(count)]


@given(
    cached=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    size=st.integers(1, 59),
    seed=st.integers(0, 9),
)
def test_the_longest_prefixes_are_on_it_and_room_is_left_for_others(
    cached: list[int], size: int, seed: int
) -> None:
    size = min(size, len(cached) - 1)
    everyone = candidates(len(cached))
    chosen = shortlist(everyone, cached, size, Random(seed))
    names = [c.worker.id for c in chosen]
    assert len(set(names)) == len(names) <= size and all(c in everyone for c in chosen)
    top = sorted((n for n in cached if n), reverse=True)[: size // 2]
    lengths = Counter(cached[c.worker.slot] for c in chosen)
    assert not Counter(top) - lengths
    held = sum(1 for n in cached if n)
    assert len(chosen) >= min(size, max(size - min(held, size // 2), 1))


def test_equals_and_others_all_have_their_turn() -> None:
    everyone, cached = candidates(100), [7] * 50 + [0] * 50
    rng = Random(1)
    seen = Counter(c.worker.id for _ in range(300) for c in shortlist(everyone, cached, 20, rng))
    assert len(seen) == 100
    assert min(seen.values()) > 10


def test_scores_are_those_of_the_candidates_on_it() -> None:
    router = Router(make_policy("lbgr", rng=Random(1), shortlist=16))
    for i in range(100):
        router.add_worker(f"w{i}")
    for i in range(50):
        ticket = router.route(Query(i, pack(range(500))), 0.1 * i)
        assert len(ticket.decision.scores) == len(ticket.candidates) == 16
        assert ticket.decision.worker in {c.worker.id for c in ticket.candidates}
        router.complete(ticket, Outcome(), 0.1 * i + 0.05)
    assert router.worker(ticket.worker.id).cached_tokens == 500


def test_a_small_fleet_is_scored_in_full() -> None:
    router = Router(make_policy("lbgr", rng=Random(1), shortlist=16))
    for i in range(16):
        router.add_worker(f"w{i}")
    assert len(router.route(Query(1, pack(range(50))), 0.0).decision.scores) == 16


def test_the_allowed_are_kept_to() -> None:
    router = Router(make_policy("lbgr", rng=Random(1), shortlist=8))
    for i in range(60):
        router.add_worker(f"w{i}")
    allowed = {f"w{i}" for i in range(0, 60, 3)}
    for i in range(40):
        assert router.route(Query(i, pack(range(i, 400))), 0.0, allowed).worker.id in allowed


def test_a_prefix_is_found_among_very_many_workers() -> None:
    router = Router(make_policy("lbgr", rng=Random(1)))
    for i in range(400):
        router.add_worker(f"w{i}")
    home = router.route(Query(0, pack(range(4000))), 0.0)
    router.complete(home, Outcome(), 0.5)
    for i in range(1, 30):
        ticket = router.route(Query(i, pack([*range(4000), i])), float(i))
        assert ticket.worker is home.worker
        router.complete(ticket, Outcome(), i + 0.2)


def test_it_costs_no_hits_and_no_time() -> None:
    found = []
    for size in (0, 32):
        workload = make_workload("gsp:groups=512,prompts=8,lengths=512/1024", rate=900, seed=2)
        config = SimConfig(
            router_params={"shortlist": size}, workers=128, kv_tokens=30_000, block_size=16, seed=2
        )
        found.append(simulate(workload, config))
    full, short = found
    assert short.hit_rate > full.hit_rate - 0.02
    assert short.ttft.mean < 1.1 * full.ttft.mean


def test_a_wrong_size_is_named() -> None:
    with pytest.raises(ValueError, match="shortlist must not be negative, not -1"):
        make_policy("lbgr", shortlist=-1)
