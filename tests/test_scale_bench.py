"""A grid gives the same results bit for bit wherever its cells run; memory does not follow a run's length."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvist.bench import Cell, run, stream
from kvist.sim import SimConfig, simulate
from kvist.spread import EXECUTORS, spread
from kvist.workloads import make_workload

GRID = [
    Cell(workload, rate, SimConfig(router=router, eviction=eviction, workers=6, kv_tokens=6000, seed=7))
    for workload in ("gsp:groups=12,prompts=6,lengths=256/512", "gsp:groups=8,prompts=6,order=round_robin")
    for router, eviction, rate in (
        ("lbgr", "rlt", 20.0),
        ("power_of_two", "l-lru", 40.0),
        ("cache_aware", "rlt", None),
    )
]


def encoded(**how: object) -> bytes:
    return msgspec.json.encode([row.to_dict() for row in run(GRID, 2, **how)])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone() -> bytes:
    return encoded()


def test_processes_give_what_one_process_gives(alone: bytes) -> None:
    assert encoded(jobs=3) == alone


def test_ray_gives_what_one_process_gives(alone: bytes) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: make test-scale")
    assert encoded(jobs=2, executor="ray") == alone


def test_processes_that_hash_differently_agree(tmp_path: Path) -> None:
    """A forked process hashes as its parent does; one on another machine does not."""
    found = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "kvist", "bench", "--workload", "gsp:groups=10,prompts=5"]
        command += ["--routers", "lbgr,power_of_two", "--workers", "5", "--kv-tokens", "8000", "--json"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_rows_stream_as_cells_end() -> None:
    rows = stream(GRID, 1)
    number, row = next(rows)
    assert number == 0 and row.router == "lbgr"
    assert sorted(number for number, _ in rows) == [1, 2, 3, 4, 5]


def doubled(task: int) -> int:
    return 2 * task


def failing(task: int) -> int:
    if task == 3:
        raise ValueError("task 3")
    return task


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("jobs", [1, 2])
def test_every_task_is_run_once_and_a_failure_is_its_own(
    executor: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="Ray is not installed: make test-scale")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = dict(spread(doubled, range(17), jobs=jobs, executor=executor))
    assert found == {i: 2 * i for i in range(17)}
    assert dict(spread(doubled, [], jobs=jobs, executor=executor)) == {}
    with pytest.raises(ValueError, match=r"^task 3$"):
        list(spread(failing, range(9), jobs=jobs, executor=executor))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown executor 'dask': choose one of processes, ray"):
        spread(doubled, [1], executor="dask")
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        spread(doubled, [1], jobs=0)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'kvist\[ray\]'"):
        list(spread(doubled, [1], executor="ray"))


def peak(requests: int) -> int:
    """Bytes at the height of a run, whose set-up (caches, the workload's pool) is the same for any length."""

    def queries() -> Iterator[object]:
        workload = make_workload(
            f"gsp:groups=10,prompts={requests // 10},lengths=64,order=round_robin", rate=100
        )
        for number, query in enumerate(workload):
            if number == 1000:
                tracemalloc.start()
            yield query

    simulate(queries(), SimConfig(workers=4, kv_tokens=2000, eviction="rlt"))  # type: ignore[arg-type]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_memory_does_not_follow_the_length_of_a_run() -> None:
    assert peak(12_000) < 1.3 * peak(4_000) + 200_000
