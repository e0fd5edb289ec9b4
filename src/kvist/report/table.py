"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvist.bench import Row

# metric -> (heading, format, factor, smaller is better)
COLUMNS: dict[str, tuple[str, str, float, bool]] = {
    "hit_rate": ("cache hits %", "{:.1f}", 100.0, False),
    "ttft_mean": ("TTFT mean ms", "{:,.0f}", 1000.0, True),
    "ttft_p50": ("p50", "{:,.0f}", 1000.0, True),
    "ttft_p95": ("p95", "{:,.0f}", 1000.0, True),
    "ttft_p99": ("p99", "{:,.0f}", 1000.0, True),
    "latency_mean": ("latency mean ms", "{:,.0f}", 1000.0, True),
    "latency_p99": ("p99 ", "{:,.0f}", 1000.0, True),
    "throughput": ("requests/s", "{:.1f}", 1.0, False),
    "goodput": ("in SLO/s", "{:.1f}", 1.0, False),
    "imbalance": ("imbalance", "{:.2f}", 1.0, True),
    "busiest_over_bound": ("work / bound", "{:.2f}", 1.0, True),
}


def shown(rows: Sequence[Row]) -> list[str]:
    """The columns these rows have."""
    return [name for name in COLUMNS if name in rows[0].metrics]


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


def bench_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each workload and rate, the best value of each column in bold."""
    tables = []
    for title, members in groups(rows):
        table = Table(title=title, title_justify="left", caption=conclusion(members), caption_justify="left")
        table.add_column("router + eviction", no_wrap=True)
        names = shown(members)
        for name in names:
            table.add_column(COLUMNS[name][0], justify="right")
        for row in sorted(members, key=lambda row: row.metrics["ttft_mean"]):
            cells = []
            for name in names:
                text = cell(row, name)
                cells.append(f"[bold]{text}[/]" if row.metrics[name] == best(members, name) else text)
            table.add_row(row.pair, *cells)
        tables.append(table)
    return tables


def conclusion(rows: Sequence[Row]) -> str:
    """One sentence in plain words."""
    if len(rows) < 2:
        return ""
    ranked = sorted(rows, key=lambda row: row.metrics["ttft_mean"])
    first, second, last = ranked[0], ranked[1], ranked[-1]
    text = (
        f"{first.pair} answers first: mean TTFT {first.metrics['ttft_mean'] * 1000:,.0f} ms, "
        f"{_times(second, first)} below {second.pair}"
    )
    if len(ranked) > 2:
        text += f" and {_times(last, first)} below {last.pair}"
    return text + "."


def _times(slow: Row, fast: Row) -> str:
    quick = fast.metrics["ttft_mean"]
    ratio = slow.metrics["ttft_mean"] / quick if quick else 1.0
    return f"{ratio:.2f} times" if ratio < 10 else f"{ratio:.0f} times"
