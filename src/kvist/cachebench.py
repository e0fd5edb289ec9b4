"""Hit rate against cache size: one cache, every eviction policy, the offline optimum as the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import mean

from kvist.bench import half_width
from kvist.cache import PrefixCache, make_eviction
from kvist.cache.belady import Future
from kvist.model import TOKEN_BYTES
from kvist.spread import spread
from kvist.workloads import make_workload

CEILING = "belady"
SEEDED = frozenset({"rlt", "random-leaf", "hedge", "lhd"})  # policies whose result depends on the seed


@dataclass(frozen=True, slots=True)
class Point:
    """Token hit rate of a policy at a cache size; `ci` is half the 95 % interval over seeds, 0 for one."""

    policy: str
    size: int
    hit_rate: float
    ci: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    workload: str
    rate: float | None
    policy: str
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    block_size: int
    seed: int  # of the workload


def working_set(workload: str, rate: float | None, seed: int, block_size: int) -> tuple[int, float]:
    """Distinct tokens of the workload, and the hit rate of a cache that holds them all."""
    future = Future(make_workload(workload, rate=rate, seed=seed), block_size * TOKEN_BYTES)
    prompt = sum(query.length for query in make_workload(workload, rate=rate, seed=seed))
    seen, hit = 0, 0
    stack = [future.tree.root]
    while stack:
        node = stack.pop()
        stack.extend(node.children.values())
        seen += node.size * block_size
        if node.state:
            hit += (len(node.state) - 1) * node.size * block_size
    return seen, hit / prompt if prompt else 0.0


def run_task(task: Task) -> list[Point]:
    """All sizes and seeds of one policy; the workload is streamed once for each."""
    workload = make_workload(task.workload, rate=task.rate, seed=task.seed)
    params = {"future": Future(workload, task.block_size * TOKEN_BYTES)} if task.policy == CEILING else {}
    points = []
    for size in task.sizes:
        rates = []
        for seed in task.seeds:
            eviction = make_eviction(task.policy, rng=Random(f"{seed}/{task.policy}"), **params)
            cache = PrefixCache(size, eviction, block_size=task.block_size)
            prompt = hit = 0
            for query in workload:
                prompt += query.length
                hit += cache.serve(query.prompt, query.arrival, query.salt, query)
            rates.append(hit / prompt if prompt else 0.0)
        ci = half_width(rates) if len(rates) > 1 else 0.0
        points.append(Point(task.policy, size, mean(rates), ci))
    return points


def run(
    workload: str,
    policies: Sequence[str],
    sizes: Sequence[int],
    *,
    rate: float | None = None,
    block_size: int = 1,
    seeds: int = 1,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> list[Point]:
    """Points in the order of `policies`, then `sizes`. The same in any number of processes."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    tasks = []
    for policy in policies:
        own = tuple(range(seed, seed + seeds)) if policy in SEEDED else (seed,)
        tasks.append(Task(workload, rate, policy, tuple(sizes), own, block_size, seed))
    done: list[list[Point]] = [[] for _ in tasks]
    for i, result in spread(run_task, tasks, jobs=jobs):
        done[i] = result
        progress()
    return [point for points in done for point in points]
