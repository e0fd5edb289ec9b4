"""The bounds hold and the exact optimum is exact: against enumeration of every assignment."""

from itertools import product
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvist.model import Cost, Query, makespan, pack
from kvist.optimum import LARGEST, Instance, assign, lower_bound, optimum, work_bound
from kvist.routing import ROUTERS, make_policy
from kvist.sim import SimConfig
from kvist.sim.base import WorkerSpec
from kvist.workloads import make_workload


def naive_loads(instance: Instance, assignment: tuple[int, ...]) -> list[float]:
    """The model word for word: each worker keeps every prompt it served."""
    held: list[list[list[int]]] = [[] for _ in instance.costs]
    loads = [0.0] * len(instance.costs)
    for query, i in zip(instance.queries, assignment, strict=True):
        tokens = [query.prompt[at : at + 4] for at in range(0, len(query.prompt), 4)]
        hit = 0
        for other in held[i]:
            common = 0
            while common < min(len(tokens), len(other)) and tokens[common] == other[common]:
                common += 1
            hit = max(hit, common)
        held[i].append(tokens)
        cost = instance.costs[i]
        loads[i] += cost.cached * hit + cost.miss * (len(tokens) - hit) + cost.output * query.output_tokens
    return loads


def enumerate_all(instance: Instance) -> float:
    choices = product(range(len(instance.costs)), repeat=len(instance.queries))
    return min(max(naive_loads(instance, assignment)) for assignment in choices)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=8)
costs = st.tuples(st.floats(0, 0.2), st.floats(0.2, 3), st.floats(0, 1)).map(lambda c: Cost(*c))


def instance_of(rows: list[list[int]], workers: list[Cost]) -> Instance:
    queries = [Query(i, pack(row), output_tokens=1 + i % 3, arrival=float(i)) for i, row in enumerate(rows)]
    return Instance(queries, workers)


instances = st.builds(
    instance_of,
    st.lists(prompts, min_size=1, max_size=6),
    st.lists(costs, min_size=1, max_size=3),
)


@settings(max_examples=40, deadline=None)
@given(instances)
@example(instance_of([[0], [0, 0]], [Cost(0.0, 1.0, 1.0), Cost(0.0, 1.0, 2.0**-14)]))  # two nearly equal
def test_optimum_equals_enumeration(instance: Instance) -> None:
    best, assignment = optimum(instance)
    assert best == pytest.approx(enumerate_all(instance), rel=1e-6, abs=1e-9)
    assert makespan(naive_loads(instance, tuple(assignment))) == pytest.approx(best)
    assert lower_bound(instance) <= best * (1 + 1e-6) + 1e-9


@settings(max_examples=50, deadline=None)
@given(instances, st.integers(0, 1000))
def test_no_policy_beats_the_bound(instance: Instance, seed: int) -> None:
    rng = Random(seed)
    assignment = tuple(rng.randrange(len(instance.costs)) for _ in instance.queries)
    assert instance.loads(assignment) == pytest.approx(naive_loads(instance, assignment))
    assert makespan(instance.loads(assignment)) >= lower_bound(instance) - 1e-9


@pytest.mark.parametrize("name", ROUTERS)
def test_policies_are_measured_on_the_model(name: str) -> None:
    queries = list(make_workload("gsp:groups=3,prompts=3,lengths=64/128"))
    instance = Instance(queries, [Cost(1e-6, 1e-4, 1e-2)] * 2)
    chosen = assign(instance, make_policy(name, rng=Random(0)))
    assert len(chosen) == 9
    assert set(chosen) <= {0, 1}
    assert makespan(instance.loads(chosen)) >= optimum(instance)[0] - 1e-9


def test_known_optimum() -> None:
    """Two groups of two alike queries on two workers: keep the groups together."""
    tokens = [[1] * 10, [2] * 10, [1] * 10, [2] * 10]
    queries = [Query(i, pack(row), arrival=float(i)) for i, row in enumerate(tokens)]
    best, assignment = optimum(Instance(queries, [Cost(0.0, 1.0)] * 2))
    assert best == pytest.approx(10.0)
    assert assignment[0] == assignment[2] != assignment[1] == assignment[3]


def test_salts_do_not_match() -> None:
    queries = [Query(i, pack([5] * 4), salt=salt) for i, salt in enumerate((b"a", b"b", b"a"))]
    instance = Instance(queries, [Cost(0.0, 1.0)])
    assert instance.loads([0, 0, 0]) == [8.0]
    assert lower_bound(instance) == pytest.approx(8.0)


def test_empty_and_too_large() -> None:
    assert lower_bound(Instance([], [Cost(0, 1)])) == 0.0
    assert optimum(Instance([], [Cost(0, 1)])) == (0.0, [])
    many = [Query(i, pack([i])) for i in range(LARGEST + 1)]
    with pytest.raises(ValueError, match=f"at most {LARGEST} queries, not {LARGEST + 1}"):
        optimum(Instance(many, [Cost(0, 1)]))


def test_work_bound_counts_distinct_tokens_over_all_speeds() -> None:
    queries = [Query(0, pack(range(100))), Query(1, pack([*range(60), *range(500, 540)]))]
    alike = work_bound(queries, SimConfig(workers=2))
    assert alike == pytest.approx(work_bound(queries[:1], SimConfig(workers=2)) * 140 / 100)
    one = work_bound(queries, SimConfig(workers=1))
    assert one == pytest.approx(2 * alike)
    fast = work_bound(queries, SimConfig(profile="llama-3.1-8b-h100", workers=1))
    fleet = (WorkerSpec("a"), WorkerSpec("b", profile="llama-3.1-8b-h100"))
    assert 1 / work_bound(queries, SimConfig(fleet=fleet)) == pytest.approx(1 / one + 1 / fast)
