"""The standard suite of eviction: every workload at cache sizes from 1 to 100 % of its working set.

What counts is the share of the gap between leaf-LRU and the offline optimum that a policy closes:
(policy - l-lru) / (optimum - l-lru), 0 for l-lru itself and 1 for the optimum. Points where that gap is below
GAP of the hit rate are shown but do not count in the mean.

The adaptive policy was designed on DESIGN; all other workloads were held out, and are reported apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean

from kvist.bench import half_width
from kvist.cache import PrefixCache, make_eviction
from kvist.cache.belady import Future
from kvist.cachebench import CEILING, working_set
from kvist.model import TOKEN_BYTES
from kvist.spread import spread
from kvist.workloads import make_workload

BASE = "l-lru"
ADAPTIVE = "hedge"
GAP = 0.005
PERCENT = (1.0, 3.0, 10.0, 30.0, 100.0)
QUICK = (3.0, 30.0)
GENERATED = (
    "gsp",
    "gsp:order=grouped",
    "gsp:order=round_robin",
    "sharegpt",
    "ultrachat",
    "loogle",
    "chats",
    "rag",
    "agents",
    "tenants",
    "scan",
)
# File and workload of each trace; used where the folder of traces has the file.
TRACES = (
    ("mooncake_conversation.jsonl", "trace:{}:limit=4000"),
    ("mooncake_conversation.jsonl", "trace:{}:skip=4000,limit=4000"),
    ("tau_airline_gpt4o_messages.jsonl.gz", "trace:{}"),
    ("sharegpt_llama31_tokids_300.jsonl.gz", "trace:{}"),
    ("sharegpt_zh_1k_messages.jsonl.gz", "trace:{}"),
    ("loogle_sample_docs.jsonl.gz", "loogle:{}"),
)
DESIGN = (
    "gsp",
    "gsp:order=round_robin",
    "sharegpt",
    "loogle",
    "chats",
    "mooncake_conversation.jsonl:limit=4000",
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One workload with one seed: all policies at all sizes. `seed` also seeds the policies."""

    workload: str
    policies: tuple[str, ...]
    percent: tuple[float, ...]
    block_size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Line:
    """Hit rates at one size of one workload: the mean over seeds, and half the 95 % interval (0 for one)."""

    workload: str
    described: str
    percent: float
    size: int  # tokens, for the first seed
    hit_rates: dict[str, float]
    ci: dict[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """closed: mean share of the gap over all points that count, with its 95 % interval over seeds.

    worst: the largest loss in hit rate against the best online policy of the run, over all points.
    design, held_out: the same over the workloads that were and were not looked at in design; None for none.
    """

    lines: list[Line]
    closed: dict[str, float]
    closed_ci: dict[str, float]
    worst: dict[str, float]
    counted: int
    design: Outcome | None = None
    held_out: Outcome | None = None


def in_design(spec: str) -> bool:
    return spec in DESIGN or Path(spec.partition(":")[2]).name in DESIGN


def workloads(traces: Path | None) -> list[str]:
    """The suite's workloads: generated ones, and the traces that the folder has."""
    if traces is None or not traces.is_dir():
        return list(GENERATED)
    return [*GENERATED, *(spec.format(traces / f) for f, spec in TRACES if (traces / f).is_file())]


def run_unit(unit: Unit) -> list[tuple[int, dict[str, float]]]:
    """(cache size in tokens, hit rate of each policy) for each share of the working set."""
    workload = make_workload(unit.workload, seed=unit.seed)
    distinct, _ = working_set(unit.workload, None, unit.seed, unit.block_size)
    future = Future(workload, unit.block_size * TOKEN_BYTES)
    found = []
    for percent in unit.percent:
        size = max(int(distinct * percent / 100), unit.block_size)
        rates = {}
        for name in unit.policies:
            params = {"future": future} if name == CEILING else {}
            policy = make_eviction(name, rng=Random(f"{unit.seed}/{name}"), **params)
            cache = PrefixCache(size, policy, block_size=unit.block_size)
            prompt = hit = 0
            for query in workload:
                prompt += query.length
                hit += cache.serve(query.prompt, query.arrival, query.salt, query)
            rates[name] = hit / prompt if prompt else 0.0
        found.append((size, rates))
    return found


def run(
    specs: Sequence[str],
    policies: Sequence[str],
    *,
    percent: Sequence[float] = PERCENT,
    block_size: int = 1,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """The suite's result, the same in any number of processes. l-lru and the optimum always take part."""
    names = tuple(dict.fromkeys((BASE, *policies, CEILING)))
    units = [Unit(spec, names, tuple(percent), block_size, seed + i) for spec in specs for i in range(seeds)]
    done: list[list[tuple[int, dict[str, float]]]] = [[] for _ in units]
    for i, result in spread(run_unit, units, jobs=jobs):
        done[i] = result
        progress()
    by_workload = {spec: done[i * seeds : (i + 1) * seeds] for i, spec in enumerate(specs)}

    def summary(of: Sequence[str]) -> Outcome | None:
        return _summary(of, names, percent, [by_workload[spec] for spec in of], seeds, seed) if of else None

    design = [spec for spec in specs if in_design(spec)]
    whole = _summary(specs, names, percent, list(by_workload.values()), seeds, seed)
    held_out = [spec for spec in specs if not in_design(spec)]
    return replace(whole, design=summary(design), held_out=summary(held_out))


def _summary(
    specs: Sequence[str],
    names: Sequence[str],
    percent: Sequence[float],
    by_workload: list[list[list[tuple[int, dict[str, float]]]]],
    seeds: int,
    seed: int,
) -> Outcome:
    lines = []
    shares: dict[str, list[list[float]]] = {name: [[] for _ in range(seeds)] for name in names}
    worst = dict.fromkeys(names, 0.0)
    for spec, runs in zip(specs, by_workload, strict=True):
        described = make_workload(spec, seed=seed).describe()
        for p, share in enumerate(percent):
            rates = {name: [run[p][1][name] for run in runs] for name in names}
            means = {name: mean(values) for name, values in rates.items()}
            ci = {name: half_width(values) if seeds > 1 else 0.0 for name, values in rates.items()}
            lines.append(Line(spec, described, share, runs[0][p][0], means, ci))
            best = max(means[name] for name in names if name != CEILING)
            for name in names:
                worst[name] = max(worst[name], best - means[name])
            if means[CEILING] - means[BASE] < GAP:
                continue
            for name in names:
                for i in range(seeds):
                    gap = rates[CEILING][i] - rates[BASE][i]
                    shares[name][i].append((rates[name][i] - rates[BASE][i]) / gap if gap else 0.0)
    counted = len(shares[BASE][0])
    each = {name: [mean(s) if s else 0.0 for s in by_seed] for name, by_seed in shares.items()}
    closed = {name: mean(values) for name, values in each.items()}
    closed_ci = {name: half_width(values) if seeds > 1 else 0.0 for name, values in each.items()}
    return Outcome(lines, closed, closed_ci, worst, counted)
