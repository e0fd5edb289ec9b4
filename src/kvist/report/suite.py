"""The standard suite: one table, and what `kvist bench --suite standard --out` writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich import box
from rich.table import Table

from kvist.cachebench import CEILING, Point
from kvist.report import page, plots
from kvist.report.names import file_name
from kvist.suite import ADAPTIVE, BASE, GAP, Outcome


def names(outcome: Outcome) -> list[str]:
    return list(outcome.closed)


def heads(outcome: Outcome) -> list[str]:
    return ["workload", "cache", *("optimum" if n == CEILING else n for n in names(outcome))]


def body(outcome: Outcome, *, intervals: bool = True) -> list[list[tuple[str, bool]]]:
    """A row for each workload and size; the best online policies are marked."""
    rows = []
    for line in outcome.lines:
        top = max(rate for name, rate in line.hit_rates.items() if name != CEILING)
        row = [(_short(line.workload), False), (f"{line.percent:g}%", False)]
        for name in names(outcome):
            rate, ci = line.hit_rates[name], line.ci[name]
            text = f"{100 * rate:.1f}" + (f" ±{100 * ci:.1f}" if intervals and ci >= 0.0005 else "")
            row.append((text, name != CEILING and f"{rate:.3f}" == f"{top:.3f}"))
        rows.append(row)
    for title, part in (("all", outcome), ("design", outcome.design), ("held out", outcome.held_out)):
        if part is not None:
            rows += _totals(title, part)
    return rows


def _totals(title: str, outcome: Outcome) -> list[list[tuple[str, bool]]]:
    """Two rows: the share of the gap that each policy closes, its worst loss to the best online policy."""
    closed = [(f"{title}: gap closed", False), (f"{outcome.counted} points", False)]
    worst = [(f"{title}: worst loss", False), ("to the best", False)]
    for name in names(outcome):
        ci = outcome.closed_ci[name]
        text = f"{100 * outcome.closed[name]:.0f}%" + (f" ±{100 * ci:.0f}" if ci >= 0.005 else "")
        closed.append((text, False))
        worst.append(("" if name == CEILING else f"{100 * outcome.worst[name]:.1f}", False))
    return [closed, worst]


def note() -> str:
    return (
        "Cache hits in % of prompt tokens, at cache sizes in % of each workload's distinct tokens. Gap "
        f"closed: (policy - l-lru) / (optimum - l-lru), mean over the points where that is above "
        f"{GAP:.1%} of the prompt tokens."
    )


def suite_table(outcome: Outcome, width: int) -> Table:
    """All policies side by side where `width` characters hold them, else the adaptive one and the best."""
    if 26 + sum(max(len(name), 4) + 1 for name in names(outcome)) <= width or ADAPTIVE not in names(outcome):
        columns, rows = heads(outcome), body(outcome, intervals=False)
    else:
        columns, rows = _brief(outcome)
    table = Table(caption=note(), caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, text in enumerate(columns):
        table.add_column(text, justify="left" if i == 0 else "right", no_wrap=i < 2, overflow="fold")
    previous = ""
    for i, row in enumerate(rows):
        first = "" if row[0][0] == previous else row[0][0]
        previous = row[0][0]
        ends = i + 1 == len(rows) or rows[i + 1][0][0] != previous
        cells = [f"[bold]{text}[/]" if good else text for text, good in row[1:]]
        table.add_row(first, *cells, end_section=ends)
    return table


def _brief(outcome: Outcome) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """The adaptive policy beside leaf-LRU, the best of the others and the optimum."""
    rows = []
    for line in outcome.lines:
        rates, own = line.hit_rates, line.hit_rates[ADAPTIVE]
        best = max((n for n in names(outcome) if n not in (ADAPTIVE, CEILING)), key=rates.__getitem__)
        numbers = [f"{100 * rates[n]:.1f}" for n in (BASE, ADAPTIVE, best)]
        cells = [*numbers, best, f"{100 * (own - rates[best]):+.1f}", f"{100 * rates[CEILING]:.1f}"]
        leads = own >= rates[best]
        rows.append(
            [
                (_short(line.workload), False),
                (f"{line.percent:g}%", False),
                *((text, leads and i == 1) for i, text in enumerate(cells)),
            ]
        )
    for title, part in (("all", outcome), ("design", outcome.design), ("held out", outcome.held_out)):
        if part is None:
            continue
        others = [n for n in names(part) if n not in (ADAPTIVE, CEILING)]
        best = max(others, key=part.closed.__getitem__)
        shares = [f"{100 * part.closed[n]:.0f}%" for n in (BASE, ADAPTIVE, best)]
        rows.append(
            [
                (f"{title}: gap closed", False),
                (f"{part.counted} pts", False),
                *((text, False) for text in (*shares, best, f"{-100 * part.worst[ADAPTIVE]:.1f}", "")),
            ]
        )
    return ["workload", "cache", BASE, ADAPTIVE, "best other", "", "lead", "optimum"], rows


def write(outcome: Outcome, out: Path) -> None:
    """suite.csv, suite.json, a hit curve for each workload as PNG and SVG, report.html."""
    out.mkdir(parents=True, exist_ok=True)
    policies = names(outcome)
    with (out / "suite.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["workload", "percent", "size", "policy", "hit_rate", "ci95"])
        for line in outcome.lines:
            for name in policies:
                rate, ci = line.hit_rates[name], line.ci[name]
                writer.writerow([line.workload, line.percent, line.size, name, rate, ci])
    (out / "suite.json").write_bytes(msgspec.json.encode(outcome))
    figures = []
    for number, spec in enumerate(dict.fromkeys(line.workload for line in outcome.lines), 1):
        lines = [line for line in outcome.lines if line.workload == spec]
        fig = plots.hit_curve(_points(outcome, spec), CEILING)
        plots.save(fig, out / f"hits-{number}")
        figures.append((lines[0].described, plots.svg(fig)))
    parts = [page.note(note()), page.table(heads(outcome), body(outcome)), page.plots(figures)]
    (out / "report.html").write_text(page.page("kvist bench: standard suite", parts), encoding="utf-8")


def _points(outcome: Outcome, spec: str) -> Sequence[Point]:
    return [
        Point(name, line.size, line.hit_rates[name], line.ci[name])
        for name in names(outcome)
        for line in outcome.lines
        if line.workload == spec
    ]


def _short(spec: str) -> str:
    """The workload's name and its parameters, or its file."""
    name, *rest = spec.split(":")
    return file_name(spec) or (f"{name} {rest[0].split('=')[-1]}" if rest else name)
