"""What `kvist theory --out` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvist.report import page, plots
from kvist.theory import Fit, Ratio, growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write(rows: Sequence[Ratio], names: Sequence[str], fits: dict[str, dict[str, Fit]], out: Path) -> None:
    """theory.json, the plot as PNG and SVG, report.html."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "theory.json").write_bytes(msgspec.json.encode({"rows": rows, "fits": fits}))

    def draw(axes: Axes) -> None:
        for i, name in enumerate(names):
            axes.plot(
                [row.n for row in rows],
                [row.ratios[name] for row in rows],
                marker="o",
                color=plots.COLOURS[i % len(plots.COLOURS)],
                label=name,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("cache size n, tokens")
        axes.set_ylabel("misses / optimum's misses")
        axes.legend(fontsize=8)

    fig = plots.figure(draw)
    plots.save(fig, out / "ratios")
    table = page.table(
        ["cache tokens", *names],
        [[(f"{row.n:,}", False), *((f"{row.ratios[n]:.2f}", False) for n in names)] for row in rows],
    )
    parts = [page.note("Misses on the adversary's sequence over the offline optimum's.")]
    parts += [page.note(f"{name} {growth(by)}") for name, by in fits.items() if by]
    parts += [page.plots([("competitive ratio, measured", plots.svg(fig))]), table]
    (out / "report.html").write_text(page.page("kvist theory", parts), encoding="utf-8")
