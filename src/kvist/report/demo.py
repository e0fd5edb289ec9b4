"""The demo's table and page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from kvist.bench import Row
from kvist.demo.run import Setup, Trial
from kvist.report import page, plots
from kvist.report.table import COLUMNS, best, cell, conclusion, groups, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# heading, field, smaller is better; times in seconds
FIGURES = (
    ("First token after, mean", "ttft_mean", True),
    ("  median", "ttft_p50", True),
    ("  95th percentile", "ttft_p95", True),
    ("  99th percentile", "ttft_p99", True),
    ("Whole answer after, mean", "latency_mean", True),
    ("  99th percentile", "latency_p99", True),
    ("Prompts found cached", "hit_rate", False),
    ("Answered a second", "throughput", False),
    ("Not answered", "failed", True),
)
HEADS = ("usual", "kvist")
WORDS = {
    "cache_aware": "cache_aware routing (longest known prefix, unless load is out of balance)",
    "l-lru": "eviction of the least recently used leaf",
    "lbgr": "LBGR routing (learns each worker's latency and takes the smallest)",
    "hedge": "hedge eviction (learns which prefixes are worth their space)",
}


def _text(field: str, value: float) -> str:
    if field == "hit_rate":
        return f"{100 * value:.1f} %"
    if field == "failed":
        return f"{value:.0f}"
    return f"{value:.2f}" if field == "throughput" else f"{value:.2f} s"


def _change(field: str, usual: float, ours: float) -> str:
    """How the second set-up compares with the first."""
    if field == "hit_rate":
        return f"{100 * (ours - usual):+.1f} points"
    if field == "failed":
        return f"{ours - usual:+.0f}" if ours != usual else "same"
    return f"{100 * (ours / usual - 1):+.0f} %" if usual else "–"


def _rows(usual: Setup, ours: Setup) -> list[tuple[str, str, str, str, bool | None]]:
    """heading, usual, ours, change, and whether ours is better (None: level)."""
    rows = []
    for heading, field, small in FIGURES:
        a, b = getattr(usual, field), getattr(ours, field)
        better = None if abs(b - a) <= 0.005 * max(abs(a), abs(b)) else (b < a) == small
        rows.append((heading, _text(field, a), _text(field, b), _change(field, a, b), better))
    return rows


def demo_table(usual: Setup, ours: Setup) -> Table:
    """The usual set-up, kvist's, and what changes; the better value in bold."""
    table = Table(title="What the HTTP clients measured", title_justify="left")
    table.add_column("")
    for head, setup in zip(HEADS, (usual, ours), strict=True):
        table.add_column(f"{head}\n{setup.pair}", justify="right")
    table.add_column("kvist against\nusual", justify="right")
    for heading, a, b, change, better in _rows(usual, ours):
        colour = {True: "green", False: "red", None: "dim"}[better]
        table.add_row(
            heading,
            f"[bold]{a}[/]" if better is False else a,
            f"[bold]{b}[/]" if better else b,
            f"[{colour}]{change}[/]",
        )
    return table


def legend(usual: Setup, ours: Setup, speed: float) -> str:
    """What the table's words mean."""
    lines = [
        f"{head}: {WORDS.get(setup.router, setup.router)} and {WORDS.get(setup.eviction, setup.eviction)}."
        for head, setup in zip(HEADS, (usual, ours), strict=True)
    ]
    clock = "Times are from the HTTP clients' own clocks"
    if speed != 1:
        clock += f", times {speed:g}: the engines run {speed:g} times faster than the GPUs they model"
    return "\n".join([*lines, f"{clock}."])


def write(
    trials: Sequence[Trial], words: str, warning: str, what: str, rows: Sequence[Row], out: Path
) -> None:
    """report.html, self-contained."""
    out.mkdir(parents=True, exist_ok=True)
    usual, ours = (trial.setup for trial in trials)
    parts = [
        page.lead(words),
        page.warning(warning) if warning else "",
        page.tiles(_tiles(usual, ours)),
        page.heading("Real HTTP traffic through a gateway"),
        page.note(f"{what}.\n{legend(usual, ours, trials[0].speed)}"),
        page.table(
            ["", *(f"{head}: {s.pair}" for head, s in zip(HEADS, (usual, ours), strict=True)), "change"],
            [
                [(heading, False), (a, better is False), (b, better is True), (change, False)]
                for heading, a, b, change, better in _rows(usual, ours)
            ],
        ),
        _drawn(trials),
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


def _tiles(usual: Setup, ours: Setup) -> list[tuple[str, str, str]]:
    return [
        (name, _text(field, getattr(ours, field)), f"usual: {_text(field, getattr(usual, field))}")
        for name, field in (
            ("First token, mean", "ttft_mean"),
            ("First token, 99th percentile", "ttft_p99"),
            ("Whole answer, mean", "latency_mean"),
            ("Prompts found cached", "hit_rate"),
        )
    ]


def _drawn(trials: Sequence[Trial]) -> str:
    """Plots of single requests, where matplotlib is installed."""
    try:
        figures = [
            ("Share of requests whose first token came within so many seconds", _cumulative(trials)),
            ("Median time to first token over the run", _over_time(trials)),
        ]
    except ModuleNotFoundError as error:
        return page.note(f"No plots: {error}")
    return page.plots((caption, plots.svg(fig)) for caption, fig in figures)


def _cumulative(trials: Sequence[Trial]) -> object:
    def draw(axes: Axes) -> None:
        for trial, head, colour in zip(trials, HEADS, (plots.GREY, plots.COLOURS[0]), strict=True):
            times = np.sort([sent.ttft for sent in trial.sent]) * trial.speed
            share = 100 * np.arange(1, len(times) + 1) / len(times)
            axes.plot(times, share, color=colour, linewidth=2, label=f"{head}: {trial.setup.pair}")
        axes.set_xlabel("seconds to the first token")
        axes.set_ylabel("% of requests")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 100)
        axes.legend(fontsize=9, loc="lower right")

    return plots.figure(draw)


def _over_time(trials: Sequence[Trial], pieces: int = 30) -> object:
    def draw(axes: Axes) -> None:
        for trial, head, colour in zip(trials, HEADS, (plots.GREY, plots.COLOURS[0]), strict=True):
            at = np.array([sent.at for sent in trial.sent]) * trial.speed
            ttft = np.array([sent.ttft for sent in trial.sent]) * trial.speed
            edges = np.linspace(0, at.max() + 1e-9, pieces + 1)
            place = np.digitize(at, edges)
            middles = [
                (edges[i - 1 : i + 1].mean(), np.median(ttft[place == i]))
                for i in range(1, pieces + 1)
                if (place == i).any()
            ]
            x, y = zip(*middles, strict=True)
            axes.plot(x, y, color=colour, linewidth=2, label=f"{head}: {trial.setup.pair}")
        axes.set_xlabel("modelled seconds since the start")
        axes.set_ylabel("seconds, median")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9)

    return plots.figure(draw)
