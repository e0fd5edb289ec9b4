"""Plots as SVG text and PNG files; needs the extra `plot`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvist.bench import Row
from kvist.report.table import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvist.cachebench import Point

# Okabe-Ito: told apart in every common form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8a8a00", "#888888")
GREY = "#888888"  # readable on light and on dark


def figure(draw: Callable[[Axes], None], *, width: float = 5.4, height: float = 3.4) -> Any:
    """A figure with one transparent pair of axes, drawn without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'kvist[plot]'") from None

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    fig.patch.set_alpha(0)
    axes = fig.subplots()
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(which="both", colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.title.set_color(GREY)
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    draw(axes)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set_alpha(0)
        for text in legend.get_texts():
            text.set_color(GREY)
    return fig


def svg(fig: Any) -> str:
    """The figure as an <svg> element to put into a page."""
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save(fig: Any, path: Path) -> None:
    """PNG (on white) and SVG beside each other."""
    path.with_suffix(".svg").write_text(svg(fig))
    fig.savefig(path.with_suffix(".png"), dpi=150, facecolor="white")


def bars(rows: Sequence[Row], metric: str) -> Any:
    """One bar for each pair of policies, the best on top."""
    heading, form, factor, small = COLUMNS[metric]
    ranked = sorted(rows, key=lambda row: row.metrics[metric], reverse=small)

    def draw(axes: Axes) -> None:
        values = [row.metrics[metric] * factor for row in ranked]
        errors = [row.ci.get(metric, 0.0) * factor for row in ranked]
        axes.barh(
            [row.pair for row in ranked],
            values,
            xerr=errors if any(errors) else None,
            color=[COLOURS[0] if row.router.startswith("lbgr") else GREY for row in ranked],
            ecolor=COLOURS[1],
        )
        for at, value in enumerate(values):
            axes.text(value + errors[at], at, " " + form.format(value), va="center", color=GREY, fontsize=9)
        longest = max(value + error for value, error in zip(values, errors, strict=True))
        axes.set_xlim(0, max(longest, 1e-9) * 1.2)
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(_label(metric, heading))

    return figure(draw, height=0.9 + 0.3 * len(ranked))


def against_rate(rows: Sequence[Row], metric: str) -> Any:
    """A line for each pair of policies over the request rate."""
    heading, _, factor, _ = COLUMNS[metric]
    pairs = list(dict.fromkeys(row.pair for row in rows))

    def draw(axes: Axes) -> None:
        for i, pair in enumerate(pairs):
            own = sorted((row for row in rows if row.pair == pair), key=lambda row: row.rate or 0)
            axes.errorbar(
                [row.rate or 0 for row in own],
                [row.metrics[metric] * factor for row in own],
                yerr=[row.ci.get(metric, 0.0) * factor for row in own],
                color=COLOURS[i % len(COLOURS)],
                marker="o",
                markersize=3,
                label=pair,
            )
        axes.set_xlabel("requests/s")
        axes.set_ylabel(_label(metric, heading))
        values = [row.metrics[metric] for row in rows]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    return figure(draw, height=3.2 + 0.1 * len(pairs))


def load_over_time(row: Row) -> Any:
    """Requests in flight on each worker over the run (first seed)."""
    series = row.results[0].series

    def draw(axes: Axes) -> None:
        for i, (name, values) in enumerate(sorted(series.items())):
            if name != "time":
                axes.plot(
                    series["time"],
                    values,
                    color=COLOURS[i % len(COLOURS)],
                    linewidth=1,
                    label=name if len(series) <= 9 else None,
                )
        axes.set_title(row.pair, fontsize=9)
        axes.set_xlabel("seconds")
        axes.set_ylabel("requests in flight")
        if len(series) <= 9:
            axes.legend(fontsize=8, ncols=4)

    return figure(draw, height=2.6)


def hit_curve(points: Sequence[Point], ceiling: str) -> Any:
    """Hit rate against cache size, a line for each policy, the ceiling dashed."""
    names = list(dict.fromkeys(point.policy for point in points))

    def draw(axes: Axes) -> None:
        for i, name in enumerate(names):
            own = [point for point in points if point.policy == name]
            axes.errorbar(
                [point.size for point in own],
                [100 * point.hit_rate for point in own],
                yerr=[100 * point.ci for point in own],
                color=GREY if name == ceiling else COLOURS[i % len(COLOURS)],
                linestyle="--" if name == ceiling else "-",
                marker="o",
                markersize=3,
                label=f"{name} (offline optimum)" if name == ceiling else name,
            )
        axes.set_xscale("log")
        axes.set_xlabel("cache size, tokens")
        axes.set_ylabel("cache hits %")
        axes.legend(fontsize=8)

    return figure(draw, height=4)


def _label(metric: str, heading: str) -> str:
    kind = {"ttft": "TTFT ", "latency": "latency "}.get(metric.split("_")[0], "")
    heading = heading.strip()
    return heading if not kind or heading.lower().startswith(kind.strip().lower()) else f"{kind}{heading} ms"
