"""The routing suite: points, the summary's arithmetic, the same in any number of processes, the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from kvist.report.routesuite import body, tables, verdict, write
from kvist.routesuite import (
    FLEETS,
    MIXED,
    Fleet,
    Line,
    Outcome,
    Point,
    Unit,
    capacity,
    losses,
    points,
    run,
    run_unit,
    standings,
)

WORKLOAD = "gsp:groups=8,prompts=8,lengths=512/1024"
ROUTERS = ("lbgr", "lmetric", "least_load", "clairvoyant")


def few() -> list[Point]:
    return [Point(WORKLOAD, FLEETS[0], load) for load in (0.3, 0.9)]


def test_points_without_traces_are_the_generated_ones() -> None:
    found = points(None)
    assert found and not any(point.workload.startswith("trace") for point in found)
    held = {point.workload for point in found if point.held_out}
    assert held and not held & {point.workload for point in found if not point.held_out}


def test_capacity_is_the_sum_over_workers() -> None:
    one, count = capacity(WORKLOAD, Fleet("", FLEETS[0].profiles[:1]))
    four, _ = capacity(WORKLOAD, FLEETS[0])
    mixed, _ = capacity(WORKLOAD, FLEETS[1])
    assert four == pytest.approx(4 * one) and mixed > 2 * four and count == 64


def test_a_slow_worker_is_slow_in_the_middle_third() -> None:
    specs = FLEETS[2].specs(90.0)
    assert specs[0].paces == ((30.0, 4.0), (60.0, 1.0)) and not any(spec.paces for spec in specs[1:])


def line(load: float, **seconds: tuple[float, ...]) -> Line:
    return Line("w", "f", load, False, seconds, seconds, dict.fromkeys(seconds, 0.0))


def test_standings_by_hand() -> None:
    lines = [
        line(0.9, lbgr=(2.0,), lmetric=(4.0,), preble=(8.0,), clairvoyant=(1.0,)),
        line(1.1, lbgr=(8.0,), lmetric=(16.0,), preble=(4.0,), clairvoyant=(1.0,)),
        line(0.3, lbgr=(1.0,), lmetric=(1.0,), preble=(9.0,), clairvoyant=(1.0,)),
    ]
    loaded = standings(lines, ("lbgr", "lmetric", "preble", "clairvoyant"))[0]
    assert (loaded.group, loaded.router, loaded.figure, loaded.points) == ("loaded", "lbgr", "mean", 2)
    assert loaded.to_best == pytest.approx((0.5 * 2.0) ** 0.5)
    assert loaded.to_single == pytest.approx((2 / 8 * 8 / 4) ** 0.5), "preble is the better single one"
    assert loaded.to_clairvoyant == pytest.approx(4.0)
    assert loaded.worse == loaded.clearly == 1 and loaded.worst == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ours", "theirs", "worse", "clearly"),
    [
        ((1.1, 2.1, 3.1), (1.0, 2.0, 3.0), 1, 1),  # always a tenth above, however far apart the seeds are
        ((1.01, 2.01, 3.01), (1.0, 2.0, 3.0), 1, 0),
        ((1.5, 1.8, 3.1), (1.0, 2.0, 3.0), 0, 0),  # 6 % above, now and then below
        ((0.9, 1.9, 2.9), (1.0, 2.0, 3.0), 0, 0),
        ((1.01,), (1.0,), 0, 0),
        ((1.03,), (1.0,), 1, 1),
    ],
)
def test_a_point_is_worse_beyond_the_interval_of_the_paired_difference(
    ours: tuple[float, ...], theirs: tuple[float, ...], worse: int, clearly: int
) -> None:
    found = standings([line(0.9, lbgr=ours, lmetric=theirs)], ("lbgr", "lmetric"))[0]
    assert (found.worse, found.clearly) == (worse, clearly)


def test_the_same_in_any_number_of_processes_and_written(tmp_path: Path) -> None:
    outcome = run(few(), ROUTERS, seeds=2)
    assert run(few(), ROUTERS, seeds=2, jobs=2) == outcome
    assert len(body(outcome)) == 2 and all(table.row_count for table in tables(outcome, 200))
    first = verdict(outcome)[0]
    assert first.startswith(("lbgr, loaded: mean TTFT 0.", "lbgr, loaded: mean TTFT 1."))
    assert "of the clairvoyant's" in first and "of 1 points" in first
    write(outcome, tmp_path)
    rows = list(csv.DictReader((tmp_path / "routing.csv").open()))
    assert len(rows) == 2 * len(ROUTERS) and all(float(row["ttft_mean"]) > 0 for row in rows)
    assert json.loads((tmp_path / "routing.json").read_text())["seeds"] == 2
    assert "routing suite" in (tmp_path / "routing.html").read_text()


def test_narrow_terminals_get_the_first_router_beside_the_best_rule() -> None:
    lines = [
        line(0.9, lbgr=(2.0,), lmetric=(4.0,), preble=(3.0,)),
        line(1.1, lbgr=(9.0,), lmetric=(5.0,), preble=(7.0,)),
    ]
    routers = ("lbgr", "lmetric", "preble")
    outcome = Outcome(routers, 1, lines, standings(lines, routers))
    points, summary = tables(outcome, 80)
    cells = [list(column.cells) for column in points.columns]
    assert [column[0] for column in cells][1:4] == ["[bold]2 / 2[/]", "3 / 3", "preble"]
    assert [column[1] for column in cells][1:4] == ["9 / 9", "[bold]5 / 5[/]", "lmetric"]
    assert summary.row_count == len(outcome.standings) + 2
    assert [(found[0].load, *found[1:]) for found in losses(lines, "lbgr")] == [
        (1.1, "mean", "lmetric", pytest.approx(1.8)),
        (1.1, "p99", "lmetric", pytest.approx(1.8)),
    ]
    assert sum("worse: " in words for words in verdict(outcome)) == 2


@pytest.mark.parametrize("load", [0.3, 1.1])
def test_slow_workers_of_a_mixed_fleet_get_no_burst(load: float) -> None:
    """Few answers of a slow worker do not make it look like the fast ones, whose answers are many."""
    point = Point("sharegpt:clients=150,message=128,output=64", MIXED[0], load)
    p99 = {router: run_unit(Unit(point, router, (), 0)).ttft.p99 for router in ("lbgr", "lmetric")}
    assert p99["lbgr"] < 0.8 * p99["lmetric"]


def test_workers_never_heard_of_are_tried_though_they_hold_nothing() -> None:
    """All share a long prefix. The little that is new at the worker that has it is no measure of a try."""
    workload = "gsp:groups=1,prompts=400,shared=0.95,lengths=4000,output=100"
    point = Point(workload, Fleet("", (FLEETS[4].profiles[0],) * 4), 0.3)
    ttft = {router: run_unit(Unit(point, router, (), 0)).ttft.mean for router in ("lbgr", "lmetric")}
    assert ttft["lbgr"] < 2 * ttft["lmetric"]


def test_an_unknown_router_is_named() -> None:
    with pytest.raises(ValueError, match="unknown routing policy 'best'"):
        run(few()[:1], ("best",))
