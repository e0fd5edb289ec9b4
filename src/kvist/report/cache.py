"""Hit rate against cache size: the table, and what `kvist cache --out` writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from kvist.cachebench import CEILING, Point
from kvist.report import page, plots


def grid(points: Sequence[Point]) -> tuple[list[str], list[int], dict[tuple[str, int], Point]]:
    """Policies, sizes and the point at each crossing."""
    names = list(dict.fromkeys(point.policy for point in points))
    sizes = sorted({point.size for point in points})
    return names, sizes, {(point.policy, point.size): point for point in points}


def cells(points: Sequence[Point]) -> list[list[tuple[str, bool]]]:
    """A row for each size; the best online policy is marked."""
    names, sizes, at = grid(points)
    rows = []
    for size in sizes:
        top = max((at[name, size].hit_rate for name in names if name != CEILING), default=0.0)
        row = [(f"{size:,}", False)]
        for name in names:
            point = at[name, size]
            text = f"{100 * point.hit_rate:.1f}" + (f" ±{100 * point.ci:.1f}" if point.ci else "")
            row.append((text, name != CEILING and f"{point.hit_rate:.3f}" == f"{top:.3f}"))
        rows.append(row)
    return rows


def headings(names: Sequence[str]) -> list[str]:
    return ["cache tokens", *(f"{n} (optimum)" if n == CEILING else n for n in names)]


def cache_table(points: Sequence[Point], title: str) -> Table:
    names, _, _ = grid(points)
    table = Table(title=title, title_justify="left", caption="cache hits, % of prompt tokens")
    for text in headings(names):
        table.add_column(text, justify="right")
    for row in cells(points):
        table.add_row(*(f"[bold]{text}[/]" if good else text for text, good in row))
    return table


def write(points: Sequence[Point], title: str, out: Path) -> None:
    """hits.csv, hits.json, the curve as PNG and SVG, report.html."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "hits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "size", "hit_rate", "ci95"])
        writer.writerows((point.policy, point.size, point.hit_rate, point.ci) for point in points)
    (out / "hits.json").write_bytes(msgspec.json.encode(points))
    fig = plots.hit_curve(points, CEILING)
    plots.save(fig, out / "hits")
    names, _, _ = grid(points)
    parts = [
        page.note(title),
        page.plots([("cache hits against cache size", plots.svg(fig))]),
        page.table(headings(names), cells(points)),
    ]
    (out / "report.html").write_text(page.page("kvist cache", parts), encoding="utf-8")
