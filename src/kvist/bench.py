"""Grids of simulations: workloads x routers x evictions x rates x seeds, in one process or several.

Every cell is independent and seeded by its own parameters, so the results are the same, bit for bit, in any
number of processes. One cell is one process: a cluster's routing decisions follow one another, and they, not
the engines, are most of the work where workers are many (benchmarks/scale.py measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev
from typing import Any

from kvist.optimum import work_bound
from kvist.sim import SimConfig, SimResult, simulate
from kvist.spread import spread
from kvist.workloads import make_workload

# Two-sided 95 % quantiles of Student's t for 1 … 9 degrees of freedom; about 2 beyond.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation. rate: requests/s, None for the workload's own. bound: compare with `work_bound`."""

    workload: str
    rate: float | None
    config: SimConfig
    bound: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The cells that differ only in their seed. `ci` holds the half-width of the 95 % interval per metric."""

    workload: str
    described: str
    rate: float | None
    router: str
    eviction: str
    results: tuple[SimResult, ...]
    metrics: dict[str, float]
    ci: dict[str, float]

    @property
    def pair(self) -> str:
        return f"{self.router} + {self.eviction}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the metrics' means over seeds, their intervals, and each seed's full result."""
        return {
            "workload": self.workload,
            "described": self.described,
            "rate": self.rate,
            "router": self.router,
            "eviction": self.eviction,
            "metrics": self.metrics,
            "ci95": self.ci,
            "seeds": [result.to_dict() for result in self.results],
        }


def metrics(result: SimResult, bound: float) -> dict[str, float]:
    """The flat figures of one run; times in seconds. `bound`: see `optimum.work_bound`."""
    busiest = max((worker.busy for worker in result.workers), default=0.0)
    found: dict[str, float] = {
        "hit_rate": result.hit_rate,
        "throughput": result.throughput,
        "output_throughput": result.output_throughput,
        "goodput": result.goodput,
        "slo_attainment": result.slo_attainment,
        "imbalance": result.imbalance,
        "makespan": result.makespan,
        "preemptions": float(result.preemptions),
        "failed": float(result.failed + result.refused),
    }
    if bound:
        found["busiest_over_bound"] = busiest / bound
    for name in ("ttft", "tpot", "latency"):
        summary = getattr(result, name)
        for part in ("mean", "p50", "p95", "p99"):
            found[f"{name}_{part}"] = getattr(summary, part)
    return found


def run_cell(cell: Cell) -> tuple[SimResult, float, str]:
    """One simulation: result, lower bound on the busiest worker's time, description of the workload."""
    workload = make_workload(cell.workload, rate=cell.rate, seed=cell.config.seed)
    result = simulate(workload, cell.config)
    bound = work_bound(workload, cell.config) if cell.bound else 0.0
    return result, bound, workload.describe()


def run(
    cells: Sequence[Cell],
    seeds: int,
    jobs: int = 1,
    progress: Callable[[], None] = lambda: None,
    executor: str = "processes",
) -> list[Row]:
    """Run each cell with `seeds` seeds from its own on; rows in the order of the cells."""
    rows = dict(stream(cells, seeds, jobs, progress, executor))
    return [rows[i] for i in range(len(cells))]


def stream(
    cells: Sequence[Cell],
    seeds: int,
    jobs: int = 1,
    progress: Callable[[], None] = lambda: None,
    executor: str = "processes",
) -> Iterator[tuple[int, Row]]:
    """(number of the cell, its row) as soon as all of its seeds are done. See `kvist.spread.spread`."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    tasks = [
        replace(cell, config=replace(cell.config, seed=cell.config.seed + i))
        for cell in cells
        for i in range(seeds)
    ]
    done: dict[int, dict[int, tuple[SimResult, float, str]]] = {}
    for task, result in spread(run_cell, tasks, jobs=jobs, executor=executor):
        progress()
        number, seed = divmod(task, seeds)
        found = done.setdefault(number, {})
        found[seed] = result
        if len(found) == seeds:
            del done[number]
            yield number, _row(cells[number], [found[i] for i in range(seeds)])


def _row(cell: Cell, runs: list[tuple[SimResult, float, str]]) -> Row:
    found = [metrics(result, bound) for result, bound, _ in runs]
    names = list(found[0])
    means = {name: mean(run[name] for run in found) for name in names}
    ci = {name: half_width([run[name] for run in found]) for name in names} if len(found) > 1 else {}
    config = cell.config
    return Row(
        cell.workload,
        runs[0][2],
        cell.rate,
        config.router,
        config.eviction,
        tuple(result for result, _, _ in runs),
        means,
        ci,
    )


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t. Needs two values."""
    n = len(values)
    quantile = _T95[n - 2] if n - 2 < len(_T95) else 2.0
    return quantile * stdev(values) / sqrt(n)
