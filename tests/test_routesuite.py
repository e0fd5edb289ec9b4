"""The routing suite: points, the summary's arithmetic, the same in any number of processes, the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from kvist.report.routesuite import body, tables, write
from kvist.routesuite import FLEETS, Fleet, Line, Point, capacity, points, run, standings

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


def test_standings_by_hand() -> None:
    def line(load: float, ours: float, theirs: float, other: float) -> Line:
        value = {"lbgr": ours, "lmetric": theirs, "preble": other, "clairvoyant": 1.0}
        zero = dict.fromkeys(value, 0.0)
        return Line("w", "f", load, False, value, value, zero, zero, zero)

    lines = [line(0.9, 2.0, 4.0, 8.0), line(1.1, 8.0, 16.0, 4.0), line(0.3, 1.0, 1.0, 9.0)]
    loaded = standings(lines, ("lbgr", "lmetric", "preble", "clairvoyant"), 1)[0]
    assert (loaded.group, loaded.router, loaded.figure, loaded.points) == ("loaded", "lbgr", "mean", 2)
    assert loaded.to_best == pytest.approx((0.5 * 2.0) ** 0.5)
    assert loaded.to_single == pytest.approx((2 / 8 * 8 / 4) ** 0.5), "preble is the better single one"
    assert loaded.to_clairvoyant == pytest.approx(4.0)
    assert loaded.worse == 1 and loaded.worst == pytest.approx(2.0)


def test_the_same_in_any_number_of_processes_and_written(tmp_path: Path) -> None:
    outcome = run(few(), ROUTERS, seeds=2)
    assert run(few(), ROUTERS, seeds=2, jobs=2) == outcome
    assert len(body(outcome)) == 2 and all(table.row_count for table in tables(outcome))
    write(outcome, tmp_path)
    rows = list(csv.DictReader((tmp_path / "routing.csv").open()))
    assert len(rows) == 2 * len(ROUTERS) and all(float(row["ttft_mean"]) > 0 for row in rows)
    assert json.loads((tmp_path / "routing.json").read_text())["seeds"] == 2
    assert "routing suite" in (tmp_path / "routing.html").read_text()


def test_an_unknown_router_is_named() -> None:
    with pytest.raises(ValueError, match="unknown routing policy 'best'"):
        run(few()[:1], ("best",))
