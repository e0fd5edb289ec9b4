"""How far from optimal: lower bounds on the makespan of the unified model, and the exact optimum when small.

The problem solved exactly is the paper's, offline and with caches that never evict: queries in their order of
arrival, each to one worker; a query hits what it has in common with any earlier query on its worker; minimise
the largest sum of service times. Finite caches can only do worse, so it bounds every policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

import numpy as np

from kvist.engine.latency import load_profile
from kvist.model import Cost, Query, makespan
from kvist.prefix.tree import RadixTree, common_prefix
from kvist.routing import Outcome, Router, RoutingPolicy, Ticket

if TYPE_CHECKING:
    from kvist.sim.base import SimConfig

LARGEST = 24  # queries the exact optimum is tried for


@dataclass(frozen=True, slots=True)
class Instance:
    """Queries in order of arrival and the cost coefficients of each worker (M of them)."""

    queries: Sequence[Query]
    costs: Sequence[Cost]

    def shared(self) -> np.ndarray:
        """common[j, k]: tokens that queries j and k < j have in common, shape (N, N)."""
        n = len(self.queries)
        common = np.zeros((n, n), dtype=np.int64)
        for j, query in enumerate(self.queries):
            for k, earlier in enumerate(self.queries[:j]):
                if earlier.salt == query.salt:
                    limit = min(len(query.prompt), len(earlier.prompt))
                    common[j, k] = common_prefix(query.prompt, 0, earlier.prompt, limit) // query.unit
        return common

    def loads(self, assignment: Sequence[int]) -> list[float]:
        """P_i of every worker if query j goes to worker assignment[j]; caches never evict."""
        common = self.shared()
        loads = [0.0] * len(self.costs)
        for j, (query, i) in enumerate(zip(self.queries, assignment, strict=True)):
            hit = max((int(common[j, k]) for k in range(j) if assignment[k] == i), default=0)
            loads[i] += self.costs[i].service(query.length, hit, query.output_tokens)
        return loads


def lower_bound(instance: Instance) -> float:
    """A makespan no assignment beats: the longest query at its best, and the least total work, shared out.

    Each query is granted the best hit any worker could have. For the total, any weights y_i >= 0 with sum 1
    give a bound: T >= sum_i y_i P_i >= sum_j min_i y_i Cost_ij; the weights are the workers' speeds.
    """
    if not instance.queries:
        return 0.0
    tree = RadixTree(instance.queries[0].unit, _Silent())
    best_hit = [_grow(tree, query) for query in instance.queries]
    costs = np.array(
        [
            [cost.service(query.length, hit, query.output_tokens) for cost in instance.costs]
            for query, hit in zip(instance.queries, best_hit, strict=True)
        ]
    )
    speeds = 1 / np.maximum(costs.mean(axis=0), 1e-12)
    shared_out = (costs * (speeds / speeds.sum())).min(axis=1).sum()
    return float(max(costs.min(axis=1).max(), shared_out))


def optimum(instance: Instance, time_limit: float = 60.0) -> tuple[float, list[int]]:
    """The smallest makespan and an assignment that has it, by mixed-integer programming (HiGHS).

    Raises ValueError above LARGEST queries or if the solver does not finish in `time_limit` seconds.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the exact optimum needs scipy: pip install 'kvist[optimum]'") from None

    n, m = len(instance.queries), len(instance.costs)
    if n > LARGEST:
        raise ValueError(f"the exact optimum is for at most {LARGEST} queries, not {n}")
    if not n:
        return 0.0, []
    common = instance.shared()
    pairs = [(i, j, k) for i in range(m) for j in range(n) for k in range(j) if common[j, k]]
    # Variables: x[i, j] (query j on worker i), z[i, j, k] (its hit is what it shares with k), makespan T.
    size = m * n + len(pairs) + 1
    rows: list[tuple[dict[int, float], float, float]] = []
    for j in range(n):
        rows.append(({i * n + j: 1.0 for i in range(m)}, 1.0, 1.0))
    uses: dict[tuple[int, int], dict[int, float]] = {}
    load: list[dict[int, float]] = [{size - 1: -1.0} for _ in range(m)]
    for i in range(m):
        cost = instance.costs[i]
        for j, query in enumerate(instance.queries):
            load[i][i * n + j] = cost.service(query.length, 0, query.output_tokens)
    for at, (i, j, k) in enumerate(pairs, start=m * n):
        rows.append(({at: 1.0, i * n + k: -1.0}, -np.inf, 0.0))
        uses.setdefault((i, j), {i * n + j: -1.0})[at] = 1.0
        load[i][at] = -(instance.costs[i].miss - instance.costs[i].cached) * float(common[j, k])
    rows += [(terms, -np.inf, 0.0) for terms in uses.values()]
    rows += [(terms, -np.inf, 0.0) for terms in load]
    entries = [(r, c, v) for r, (terms, _, _) in enumerate(rows) for c, v in terms.items()]
    where_r, where_c, values = zip(*entries, strict=True)
    matrix = coo_matrix((values, (where_r, where_c)), shape=(len(rows), size)).tocsr()
    objective = np.zeros(size)
    objective[-1] = 1.0
    integral = np.ones(size)
    integral[-1] = 0
    upper = np.ones(size)
    upper[-1] = np.inf
    found = milp(
        objective,
        constraints=LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
        integrality=integral,
        bounds=Bounds(0, upper),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},  # by default 1e-4 passes for optimal
    )
    if found.status != 0:
        raise ValueError(f"the solver found no proven optimum: {found.message}: take fewer queries")
    x = found.x[: m * n].reshape(m, n)
    assignment = [int(i) for i in x.argmax(axis=0)]
    return makespan(instance.loads(assignment)), assignment


def work_bound(queries: Iterable[Query], config: SimConfig) -> float:
    """Seconds that the busiest worker of a simulated cluster must compute, whatever the policies.

    Every distinct prompt token has to be computed once somewhere, worker i takes at least `b_i` a token, and
    work shared out so that all end together gives tokens / sum(1 / b_i). Needs one pass; holds each distinct
    prefix once.
    """
    names = [spec.profile or config.profile for spec in config.specs()]
    speed = sum(1e6 / load_profile(name).b_us_per_token for name in names)
    tree = RadixTree(config.unit, _Silent())
    for query in queries:
        _grow(tree, query)
    return tree.total / speed


def _grow(tree: RadixTree, query: Query) -> int:
    """Tokens of the query that some earlier one had as a prefix too; the tree holds all of it afterwards."""
    walk = tree.walk(query.prompt, query.salt)
    node, offset = (walk.path[-1] if walk.path else tree.root), walk.offset
    if walk.part:
        assert walk.partial is not None
        node = tree.split(walk.partial, walk.part)
        offset += walk.part * tree.stride
    if offset < len(query.prompt):
        tree.append(node, query.prompt, offset, len(query.prompt), query.salt)
    return offset // tree.stride


class _Silent:
    """Nobody needs to hear of changes in a tree that only grows."""

    def _ignore(self, *nodes: object) -> None:
        pass

    split = candidate = retract = remove = settle = _ignore


def assign(instance: Instance, policy: RoutingPolicy) -> list[int]:
    """What a routing policy does with the instance: each worker serves one query at a time, in order.

    The policy learns a query's latency when the worker is done with it, as it would on a live cluster.
    """
    router = Router(policy)
    ids = [f"w{i}" for i in range(len(instance.costs))]
    for worker_id in ids:
        router.add_worker(worker_id)
    common = instance.shared()
    free = [0.0] * len(ids)
    running: list[tuple[float, int, Ticket]] = []
    assignment: list[int] = []
    for j, query in enumerate(instance.queries):
        while running and running[0][0] <= query.arrival:
            end, _, ticket = heappop(running)
            router.complete(ticket, Outcome(), end)
        ticket = router.route(query, query.arrival)
        i = ids.index(ticket.worker.id)
        hit = max((int(common[j, k]) for k in range(j) if assignment[k] == i), default=0)
        start = max(free[i], query.arrival)
        free[i] = start + instance.costs[i].service(query.length, hit, query.output_tokens)
        assignment.append(i)
        heappush(running, (free[i], j, ticket))
    return assignment
