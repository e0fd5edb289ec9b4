"""Reports: what the files hold, and that a page needs nothing but itself."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvist import cachebench
from kvist.bench import Cell, Row, half_width, run
from kvist.report.table import bench_tables, conclusion, ranked, shown
from kvist.sim import SimConfig

SMALL = "gsp:groups=4,prompts=6,lengths=64/256"
MIDDLE = "gsp:groups=8,prompts=16,lengths=64/256"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    cells = [
        Cell(SMALL, rate, SimConfig(router=router, eviction=eviction, workers=2), bound=True)
        for rate in (10.0, 40.0)
        for router in ("lbgr", "random")
        for eviction in ("rlt", "l-lru")
    ]
    return run(cells, seeds=2)


class Page(HTMLParser):
    """Collects what would make a browser fetch something, and tags that stay open."""

    VOID = {"meta", "br", "img", "link", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {key}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.outside == []
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", text)
    assert "svg" in page.tags
    assert 'name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    return text


def test_bench_writes_everything(rows: list[Row], tmp_path: Path) -> None:
    from kvist.report.bench import write

    write(rows, tmp_path / "new" / "folder")
    out = tmp_path / "new" / "folder"
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 8
    for line, row in zip(table, rows, strict=True):
        assert (line["router"], line["eviction"]) == (row.router, row.eviction)
        assert float(line["ttft_mean"]) == row.metrics["ttft_mean"]
        assert float(line["ttft_mean_ci95"]) == row.ci["ttft_mean"]
    data = json.loads((out / "results.json").read_text())
    assert len(data[0]["seeds"]) == 2
    assert data[0]["metrics"]["hit_rate"] == rows[0].metrics["hit_rate"]
    text = check_page(out / "report.html")
    assert "against the request rate" in text
    assert conclusion(rows[:4]) in text
    for name in ("1-ttft_mean", "2-hit_rate", "rates-1-ttft_p99"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.svg").read_text().startswith("<svg")


def test_bench_is_the_same_in_several_processes() -> None:
    cells = [
        Cell(SMALL, 30.0, SimConfig(router=router, eviction="rlt", workers=2))
        for router in ("lbgr", "power_of_two")
    ]
    assert run(cells, seeds=2, jobs=2) == run(cells, seeds=2, jobs=1)


def test_bound_is_below_what_ran(rows: list[Row]) -> None:
    assert all(row.metrics["busiest_over_bound"] >= 1 for row in rows)


def test_tables_fit_a_terminal(rows: list[Row]) -> None:
    from rich.console import Console

    for width in (80, 200):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        for table in bench_tables(rows, width):
            console.print(table)
        text = console.export_text()
        assert "…" not in text
        assert ("goodput" in text or "in SLO" in text) == (width == 200)
        assert max(map(len, text.splitlines())) <= width


def test_conclusion_in_plain_words(rows: list[Row]) -> None:
    text = conclusion(rows[:4])
    assert text.startswith(f"Answers soonest: {ranked(rows[:4])[0].pair}, mean TTFT ")
    assert conclusion(rows[:1]) == ""


def test_lost_requests_are_said() -> None:
    cells = [Cell(SMALL, None, SimConfig(router="random", workers=1, kv_tokens=kv)) for kv in (100, 4000)]
    lossy, whole = run(cells, seeds=1)
    assert "failed" in shown([lossy, whole])
    assert ranked([lossy, whole]) == [whole, lossy]
    assert "Pairs that failed requests: 1" in conclusion([lossy, whole])
    assert "too small" in conclusion([lossy])


def test_half_width_is_students() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5)
    assert half_width([5.0, 5.0]) == 0.0


def test_cache_curve(tmp_path: Path) -> None:
    from kvist.report.cache import write

    distinct, most = cachebench.working_set(MIDDLE, None, 0, 1)
    points = cachebench.run(MIDDLE, ["l-lru", "rlt", "belady"], [1000, distinct], seeds=3)
    assert points == cachebench.run(MIDDLE, ["l-lru", "rlt", "belady"], [1000, distinct], seeds=3, jobs=2)
    rates = {(point.policy, point.size): point.hit_rate for point in points}
    for size in (1000, distinct):
        assert rates["belady", size] >= max(rates["l-lru", size], rates["rlt", size]) - 1e-12
    assert rates["l-lru", distinct] == rates["belady", distinct] == pytest.approx(most)
    assert next(p.ci for p in points if p.policy == "rlt" and p.size == 1000) > 0
    write(points, "a <title>", tmp_path)
    assert "a &lt;title&gt;" in check_page(tmp_path / "report.html")
    with (tmp_path / "hits.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + 6


def test_theory_page(tmp_path: Path) -> None:
    from kvist.report.theory import write
    from kvist.theory import fit, measure

    found = measure([4, 8, 16], ["l-lru"])
    fits = {"l-lru": {shape: fit(found, "l-lru", shape) for shape in ("linear", "log")}}
    write(found, ["l-lru"], fits, tmp_path)
    assert "l-lru grows like n" in check_page(tmp_path / "report.html")
    assert json.loads((tmp_path / "theory.json").read_text())["rows"][0]["n"] == 4
