"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvist.bench import Row

# metric -> (heading, format, factor, smaller is better)
COLUMNS: dict[str, tuple[str, str, float, bool]] = {
    "hit_rate": ("cache hits %", "{:.1f}", 100.0, False),
    "ttft_mean": ("TTFT mean ms", "{:,.0f}", 1000.0, True),
    "ttft_p50": ("TTFT p50", "{:,.0f}", 1000.0, True),
    "ttft_p95": ("TTFT p95", "{:,.0f}", 1000.0, True),
    "ttft_p99": ("TTFT p99 ms", "{:,.0f}", 1000.0, True),
    "latency_mean": ("latency mean ms", "{:,.0f}", 1000.0, True),
    "latency_p99": ("latency p99", "{:,.0f}", 1000.0, True),
    "throughput": ("requests/s", "{:.1f}", 1.0, False),
    "goodput": ("in SLO/s", "{:.1f}", 1.0, False),
    "imbalance": ("imbalance", "{:.2f}", 1.0, True),
    "busiest_over_bound": ("work / bound", "{:.2f}", 1.0, True),
    "failed": ("failed", "{:,.0f}", 1.0, True),
}
BRIEF = ("hit_rate", "ttft_mean", "ttft_p99", "latency_mean", "imbalance", "failed")
WIDE = 150  # characters from which on a terminal gets all columns


def shown(rows: Sequence[Row], *, brief: bool = False) -> list[str]:
    """The columns these rows have; `failed` only where something did."""
    return [
        name
        for name in (BRIEF if brief else COLUMNS)
        if name in rows[0].metrics and (name != "failed" or any(row.metrics[name] for row in rows))
    ]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """By mean TTFT; rows that lost requests come last, whatever the rest had to wait."""
    return sorted(rows, key=lambda row: (row.metrics["failed"], row.metrics["ttft_mean"]))


def cell(row: Row, name: str) -> str:
    _, form, factor, _ = COLUMNS[name]
    text = form.format(row.metrics[name] * factor)
    if name in row.ci and row.ci[name] > 0:
        text += " ±" + form.format(row.ci[name] * factor)
    return text


def best(rows: Sequence[Row], name: str) -> float:
    values = [row.metrics[name] for row in rows]
    return min(values) if COLUMNS[name][3] else max(values)


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that can be compared, under a title: the same workload at the same rate."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.workload, row.rate), []).append(row)
    titled = []
    for (_, rate), members in found.items():
        pace = "" if rate is None else f", {rate:g} requests/s"
        titled.append((members[0].described + pace, members))
    return titled


def bench_tables(rows: Sequence[Row], width: int = WIDE) -> list[Table]:
    """A table for each workload and rate, best pair first, the best value of each column in bold.

    On a terminal of fewer than WIDE characters only the BRIEF columns.
    """
    tables = []
    for title, members in groups(rows):
        table = Table(title=title, title_justify="left", caption=conclusion(members), caption_justify="left")
        table.add_column("router + eviction", no_wrap=True)
        names = shown(members, brief=width < WIDE)
        for name in names:
            table.add_column(COLUMNS[name][0], justify="right")
        for row in ranked(members):
            cells = []
            for name in names:
                text = cell(row, name)
                cells.append(f"[bold]{text}[/]" if row.metrics[name] == best(members, name) else text)
            table.add_row(row.pair, *cells)
        tables.append(table)
    return tables


def conclusion(rows: Sequence[Row]) -> str:
    """A sentence or two in plain words."""
    lost = sum(row.metrics["failed"] > 0 for row in rows)
    warning = f" Pairs that failed requests: {lost}, see the last column." if lost else ""
    if lost == len(rows):
        return "No pair served every request: the cache is too small for some of the prompts."
    if len(rows) < 2:
        return warning.strip()
    first, *rest = [row for row in ranked(rows) if not row.metrics["failed"]]
    text = f"Answers soonest: {first.pair}, mean TTFT {first.metrics['ttft_mean'] * 1000:,.0f} ms"
    level = [row for row in rest if _level(first, row)]
    behind = [row for row in rest if not _level(first, row)]
    if level:
        text += f", level with {', '.join(row.pair for row in level)}"
    if behind:
        text += f"; {behind[0].pair} takes {_times(behind[0], first)} as long"
    if len(behind) > 1:
        text += f", {behind[-1].pair} {_times(behind[-1], first)}"
    return text + "." + warning


def _level(first: Row, other: Row) -> bool:
    """Within their confidence intervals, or within 1 % where there are none."""
    gap = other.metrics["ttft_mean"] - first.metrics["ttft_mean"]
    if first.ci:
        return gap <= first.ci["ttft_mean"] + other.ci["ttft_mean"]
    return gap <= 0.01 * first.metrics["ttft_mean"]


def _times(slow: Row, fast: Row) -> str:
    quick = fast.metrics["ttft_mean"]
    ratio = slow.metrics["ttft_mean"] / quick if quick else 1.0
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"
