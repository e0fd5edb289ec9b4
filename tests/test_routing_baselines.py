"""Preble, SkyLB, llm-d's predictor and the clairvoyant do what their rules say; a worker's pace changes."""

from __future__ import annotations

from random import Random

import pytest

from kvist.model import Query, pack
from kvist.routing import Outcome, Router, make_policy
from kvist.sim import SimConfig, WorkerSpec, simulate
from kvist.workloads import make_workload


def router(name: str, workers: str = "ab", **params: object) -> Router:
    found = Router(make_policy(name, rng=Random(0), **params))
    for worker in workers:
        found.add_worker(worker)
    return found


def prompt(group: int, shared: int, own: int) -> bytes:
    return pack([group] * shared + [10_000 + own] * 200)


def test_preble_exploits_a_prefix_longer_than_the_rest_and_explores_otherwise() -> None:
    found = router("preble", balance=1e9)
    home = found.route(Query(0, prompt(1, 1000, 0)), 0.0).worker.id
    assert found.route(Query(1, prompt(1, 1000, 1)), 0.1).worker.id == home, "1000 cached, 200 new"
    short = Query(2, pack([1] * 150 + [77] * 1000))
    assert found.route(short, 0.2).worker.id != home, "150 cached, 1000 new: the worker without load"


def test_preble_forgets_load_outside_the_window_and_moves_it_when_out_of_balance() -> None:
    found = router("preble", window=10.0, balance=1.5)
    home = found.route(Query(0, prompt(1, 1000, 0)), 0.0).worker.id
    places = [found.route(Query(i, prompt(1, 1000, i)), 0.1).worker.id for i in range(1, 12)]
    assert set(places) == {"a", "b"}, "one group alone is shared out"
    late = found.route(Query(99, prompt(5, 300, 1)), 100.0)
    assert late.decision.scores == [0.0, 0.0] and home in "ab"


def test_skylb_pushes_only_to_workers_without_a_queue() -> None:
    found = router("skylb", "abc")
    first = found.route(Query(0, prompt(1, 1000, 0)), 0.0)
    assert found.route(Query(1, prompt(1, 1000, 1)), 0.1).worker is first.worker, "one is no queue"
    assert found.route(Query(2, prompt(1, 1000, 2)), 0.2).worker is not first.worker
    found.first_token(first, 0.3)
    assert first.worker.waiting == 1
    third = found.route(Query(3, prompt(2, 1000, 3)), 0.4).worker
    assert third.in_flight == 1, "a new prefix: fewest in flight"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("preble", {"window": 0}),
        ("preble", {"balance": 0.5}),
        ("skylb", {"pending": -1}),
        ("skylb", {"threshold": 2}),
    ],
)
def test_values_that_make_no_sense_are_refused(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        make_policy(name, **params)


WORKLOAD = "gsp:groups=16,prompts=16,lengths=1024/2048"


def ttft(router: str, fleet: tuple[WorkerSpec, ...] = (), rate: float = 8.0, **params: object) -> float:
    config = SimConfig(router=router, router_params=params, fleet=fleet, workers=4, warmup=30)
    result = simulate(make_workload(WORKLOAD, rate=rate), config)
    assert result.completed == result.requests
    return result.ttft.mean


def test_the_clairvoyant_beats_rules_on_a_mixed_fleet_and_lbgr_comes_close() -> None:
    fleet = tuple(
        WorkerSpec(f"w{i}", profile=f"llama-3.1-8b-{gpu}")
        for i, gpu in enumerate(("l40", "l40", "h100", "h100"))
    )
    bound = ttft("clairvoyant", fleet, rate=30.0)
    assert bound < 0.8 * min(ttft(name, fleet, rate=30.0) for name in ("lmetric", "cache_aware", "preble"))
    assert ttft("lbgr", fleet, rate=30.0) < 1.25 * bound


def test_the_clairvoyant_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="clairvoyant"):
        ttft("clairvoyant", prize=1)
    with pytest.raises(ValueError, match="price"):
        ttft("clairvoyant", price=-1)


def test_a_worker_of_a_slower_pace_is_slower_until_it_recovers() -> None:
    def alone(paces: tuple[tuple[float, float], ...]) -> float:
        return ttft("random", (WorkerSpec("w", paces=paces),), rate=0.5)

    slow, usual = alone(((0.0, 3.0),)), alone(())
    assert slow > 2.5 * usual
    assert usual < alone(((0.0, 3.0), (200.0, 1.0))) < slow
    with pytest.raises(ValueError, match="paces"):
        alone(((0.0, 0.0),))


def test_llm_d_predicts_once_it_is_trained() -> None:
    pytest.importorskip("xgboost")
    assert ttft("llm-d", every=50, trees=20) < ttft("random")


def test_llm_d_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(ValueError, match=r"pip install 'kvist\[xgboost\]'"):
        ttft("llm-d")


def test_waiting_counts_requests_before_their_first_token() -> None:
    found = router("round_robin", "a")
    tickets = [found.route(Query(i, pack(range(9))), 0.0) for i in range(3)]
    state = found.worker("a")
    assert state.waiting == 3
    found.first_token(tickets[0], 0.1)
    found.first_token(tickets[0], 0.2)
    assert state.waiting == 2
    for ticket in tickets:
        found.complete(ticket, Outcome(), 0.3)
    assert state.waiting == 0
