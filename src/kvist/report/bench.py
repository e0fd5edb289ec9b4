"""What `kvist bench --out` writes: results.csv, results.json, plots, report.html."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvist.bench import Row
from kvist.report import page, plots
from kvist.report.table import COLUMNS, best, cell, conclusion, groups, ranked, shown

PLOTTED = ("ttft_mean", "ttft_p99", "latency_mean", "hit_rate")


def write(rows: Sequence[Row], out: Path) -> None:
    """Fill the folder `out`, which is made if it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    _write_csv(rows, out / "results.csv")
    (out / "results.json").write_bytes(msgspec.json.encode([row.to_dict() for row in rows]))
    parts = [
        page.note(
            "Simulated clusters: each worker is a model of an engine with continuous batching and a prefix "
            "cache; the router sees only what a router would know."
        )
    ]
    by_workload: dict[str, list[Row]] = {}
    for row in rows:
        by_workload.setdefault(row.workload, []).append(row)
    for number, (title, members) in enumerate(groups(rows), 1):
        parts += [page.heading(title), page.note(conclusion(members)), _table(members)]
        figures = []
        for metric in PLOTTED:
            fig = plots.bars(members, metric)
            plots.save(fig, out / f"{number}-{metric}")
            figures.append((COLUMNS[metric][0].strip(), plots.svg(fig)))
        ordered = ranked(members)
        for row in ordered[:1] + ordered[1:][-1:]:
            fig = plots.load_over_time(row)
            plots.save(fig, out / f"{number}-load-{row.router}-{row.eviction}")
            figures.append((f"requests in flight on each worker over time, {row.pair}", plots.svg(fig)))
        parts.append(page.plots(figures))
    for number, members in enumerate(by_workload.values(), 1):
        if len({row.rate for row in members}) > 1:
            parts.append(page.heading(f"{members[0].described}: against the request rate"))
            figures = []
            for metric in PLOTTED:
                fig = plots.against_rate(members, metric)
                plots.save(fig, out / f"rates-{number}-{metric}")
                figures.append((COLUMNS[metric][0].strip(), plots.svg(fig)))
            parts.append(page.plots(figures))
    (out / "report.html").write_text(page.page("kvist bench", parts), encoding="utf-8")


def _table(rows: Sequence[Row]) -> str:
    names = shown(rows)
    return page.table(
        ["router + eviction", *(COLUMNS[name][0] for name in names)],
        [
            [(row.pair, False), *((cell(row, name), row.metrics[name] == best(rows, name)) for name in names)]
            for row in ranked(rows)
        ],
    )


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    names = list(rows[0].metrics)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["workload", "rate", "router", "eviction", *names, *(f"{name}_ci95" for name in names)]
        )
        for row in rows:
            figures = [row.metrics[name] for name in names] + [row.ci.get(name, "") for name in names]
            rate = "" if row.rate is None else row.rate
            writer.writerow([row.workload, rate, row.router, row.eviction, *figures])
