"""The demo's table and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from kvist.bench import Row
from kvist.demo.run import Setup
from kvist.report import page
from kvist.report.table import COLUMNS, best, cell, conclusion, groups, shown

# heading, field, format, factor, smaller is better
FIGURES = (
    ("cache hits", "hit_rate", "{:.1%}", 1.0, False),
    ("TTFT mean", "ttft_mean", "{:,.0f} ms", 1000.0, True),
    ("TTFT p50", "ttft_p50", "{:,.0f} ms", 1000.0, True),
    ("TTFT p95", "ttft_p95", "{:,.0f} ms", 1000.0, True),
    ("TTFT p99", "ttft_p99", "{:,.0f} ms", 1000.0, True),
    ("latency mean", "latency_mean", "{:,.0f} ms", 1000.0, True),
    ("latency p99", "latency_p99", "{:,.0f} ms", 1000.0, True),
    ("requests/s", "throughput", "{:.2f}", 1.0, False),
    ("not answered", "failed", "{:.0f}", 1.0, True),
)


def _rows(setups: Sequence[Setup]) -> list[list[tuple[str, bool]]]:
    rows = []
    for heading, field, form, factor, small in FIGURES:
        values = [getattr(setup, field) * factor for setup in setups]
        winner = min(values) if small else max(values)
        clear = len(set(values)) > 1
        rows.append([(heading, False), *((form.format(v), clear and v == winner) for v in values)])
    return rows


def demo_table(setups: Sequence[Setup]) -> Table:
    """A column for each set-up."""
    table = Table()
    table.add_column("")
    for setup in setups:
        table.add_column(setup.pair, justify="right")
    for row in _rows(setups):
        table.add_row(*(f"[bold]{text}[/]" if good else text for text, good in row))
    return table


def write(setups: Sequence[Setup], words: str, what: str, rows: Sequence[Row], out: Path) -> None:
    """report.html, self-contained."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        page.heading("Real HTTP traffic through a gateway"),
        page.note(f"{what}. Times are the HTTP client's own, scaled back to modelled time."),
        page.table(["", *(setup.pair for setup in setups)], _rows(setups)),
        page.note(words),
    ]
    for title, members in groups(rows) if rows else []:
        names = shown(members)
        body = [
            [(row.pair, False), *((cell(row, n), row.metrics[n] == best(members, n)) for n in names)]
            for row in sorted(members, key=lambda row: row.metrics["ttft_mean"])
        ]
        parts += [
            page.heading(f"Simulator: {title}"),
            page.note(conclusion(members)),
            page.table(["router + eviction", *(COLUMNS[n][0] for n in names)], body),
        ]
    (out / "report.html").write_text(page.page("kvist demo", parts), encoding="utf-8")
