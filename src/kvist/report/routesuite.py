"""The routing suite: two tables, and what `kvist bench --suite routing --out` writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import msgspec
from rich import box
from rich.table import Table

from kvist.bench import half_width
from kvist.report import page
from kvist.report.names import file_name
from kvist.routesuite import CLAIRVOYANT, LOADED, SLACK, Outcome, Standing, beside_best, losses

HEADS = ["points", "TTFT", "router", "to best", "to single", "clairvoyant", "worse", "clearly", "worst"]


def note() -> str:
    return (
        "Seconds to first token, mean / 99th percentile. Load: share of what the fleet gets through when all "
        f"requests come at once; from {LOADED:g} on it counts as loaded. To best: over the best baseline of "
        "each point, geometric mean; to single: over the one baseline that is best on all of the group; "
        "worse: points above the best baseline by more than the 95 % interval, paired by seed (one seed: "
        f"{SLACK:.0%}), clearly: and by more than {SLACK:.0%}; worst: the largest ratio. Below 1 is better."
    )


def body(outcome: Outcome) -> list[list[tuple[str, bool]]]:
    """A row for each point; the smallest mean of those that do not know the truth is marked."""
    rows = []
    for line in outcome.lines:
        average = {name: mean(line.mean[name]) for name in outcome.routers}
        top = min((average[name] for name in outcome.routers if name != CLAIRVOYANT), default=0.0)
        row = [
            (file_name(line.workload) or line.workload, False),
            (line.fleet, False),
            (f"{line.load:.0%}", False),
        ]
        for name in outcome.routers:
            text = f"{average[name]:.3g} / {mean(line.p99[name]):.3g}"
            row.append((text, name != CLAIRVOYANT and average[name] == top))
        rows.append(row)
    return rows


def standing(row: Standing) -> list[str]:
    return [
        f"{row.group} ({row.points})",
        row.figure,
        row.router,
        f"{row.to_best:.2f}",
        f"{row.to_single:.2f}",
        f"{row.to_clairvoyant:.2f}" if row.to_clairvoyant else "",
        f"{row.worse}",
        f"{row.clearly}",
        f"{row.worst:.2f}" if row.worst < 100 else f"{row.worst:.0f}",
    ]


def verdict(outcome: Outcome, router: str = "lbgr") -> list[str]:
    """What the suite asks of a router, in words, group by group."""
    lines = []
    found = {(s.group, s.figure): s for s in outcome.standings if s.router == router}
    for group in dict.fromkeys(group for group, _ in found):
        average, tail = found[group, "mean"], found[group, "p99"]
        words = f"{router}, {group}: mean TTFT {average.to_best:.2f} of each point's best fixed rule, "
        words += f"{average.to_single:.2f} of the single best one"
        if average.to_clairvoyant:
            words += f", {average.to_clairvoyant:.2f} of the clairvoyant's"
        words += f"; worse beyond the interval at {average.worse} of {average.points} points"
        lines.append(f"{words}, in the 99th percentile at {tail.worse}")
    if router in outcome.routers:
        for line, figure, best, ratio in losses(outcome.lines, router):
            where = f"{file_name(line.workload) or line.workload}, {line.fleet}, load {line.load:.0%}"
            lines.append(f"worse: {figure} {ratio:.2f} of {best}: {where}")
    return lines


def _interval(values: Sequence[float]) -> float:
    return half_width(values) if len(values) > 1 else 0.0


def _brief(outcome: Outcome) -> list[Table]:
    """The first router beside the best baseline of each point and the clairvoyant, a table a fleet."""
    own, tables = outcome.routers[0], []
    truth = CLAIRVOYANT if CLAIRVOYANT in outcome.routers else ""
    previous = ""
    for line, row in zip(outcome.lines, body(outcome), strict=True):
        cells = {
            name: f"[bold]{text}[/]" if good else text
            for name, (text, good) in zip(outcome.routers, row[3:], strict=True)
        }
        title = f"{row[0][0]}, {line.fleet}"
        if title != previous:
            tables.append(Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0)))
            for head, width in (("load", 5), (own, 18), ("best rule", 18), ("", 12), (truth, 18)):
                tables[-1].add_column(head, justify="right", min_width=width)
            previous = title
        best, _, _ = beside_best(line, "mean", own)
        tables[-1].add_row(row[2][0], cells[own], cells[best], best, cells.get(truth, ""))
    return tables


def tables(outcome: Outcome, width: int) -> list[Table]:
    """Points, all routers where `width` characters hold them, and the summary."""
    if 48 + 16 * len(outcome.routers) <= width:
        points = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        for i, head in enumerate(["workload", "fleet", "load", *outcome.routers]):
            points.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
        for row in body(outcome):
            points.add_row(*(f"[bold]{text}[/]" if good else text for text, good in row))
        found = [points]
    else:
        found = _brief(outcome)
    summary = Table(caption=note(), caption_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, head in enumerate(HEADS[2:]):
        summary.add_column(head, justify="right" if i else "left", no_wrap=True)
    previous = ""
    for each in outcome.standings:
        group, figure, *cells = standing(each)
        if previous != group + figure:
            summary.add_section()
            summary.add_row(f"[bold]{group}, {figure}[/]")
            previous = group + figure
        summary.add_row(*cells)
    return [*found, summary]


def write(outcome: Outcome, out: Path) -> None:
    """routing.csv, routing.json and routing.html."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "routing.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        figures = ["ttft_mean", "ttft_mean_ci95", "ttft_p99", "ttft_p99_ci95", "hit_rate"]
        writer.writerow(["workload", "fleet", "load", "held_out", "router", *figures])
        for line in outcome.lines:
            for name in outcome.routers:
                point = [line.workload, line.fleet, line.load, line.held_out, name]
                average, tail = line.mean[name], line.p99[name]
                found = [mean(average), _interval(average), mean(tail), _interval(tail), line.hit_rate[name]]
                writer.writerow([*point, *found])
    (out / "routing.json").write_bytes(msgspec.json.encode(outcome))
    summary = [[(text, False) for text in standing(each)] for each in outcome.standings]
    parts = [
        page.table(HEADS, summary),
        page.note(note()),
        *(page.note(line) for line in verdict(outcome)),
        page.heading("Points"),
        page.table(["workload", "fleet", "load", *outcome.routers], body(outcome)),
    ]
    (out / "routing.html").write_text(page.page("kvist bench: routing suite", parts), encoding="utf-8")
