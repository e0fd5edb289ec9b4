"""Independent tasks over processes, here or on a Ray cluster; results as they come.

A task's result is a function of the task alone, so it is the same wherever it runs. Tasks are handed out as
places become free: millions of them cost no more memory than those under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

EXECUTORS = ("processes", "ray")


def spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, jobs: int = 1, executor: str = "processes"
) -> Iterator[tuple[int, Result]]:
    """(number of the task, its result), in the order in which tasks end.

    jobs: tasks under way at once. executor: `processes` of this machine (one job: this very process), or
    `ray`: the cluster that RAY_ADDRESS names, else one of `jobs` workers on this machine. `work` must be a
    function of a module. Raises ValueError for an unknown executor or a missing Ray, and what `work` raises.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"unknown executor {executor!r}: choose one of {', '.join(EXECUTORS)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    if executor == "ray":
        return _on_ray(work, tasks, jobs)
    if jobs == 1:
        return ((number, work(task)) for number, task in enumerate(tasks))
    return _in_processes(work, tasks, jobs)


def _in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[int, Result]]:
    with ProcessPoolExecutor(jobs) as pool:
        waiting = iter(enumerate(tasks))
        pending: dict[Future[Result], int] = {}
        try:
            while True:
                for number, task in waiting:
                    pending[pool.submit(work, task)] = number
                    if len(pending) >= 2 * jobs:  # the next one is there when a process is free
                        break
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(work: Callable[[Task], Result], tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("executor ray needs Ray: pip install 'kvist[ray]'") from None
    started = _join_cluster(ray, jobs)
    try:
        remote = ray.remote(num_cpus=1)(work)
        waiting = iter(enumerate(tasks))
        pending: dict[Any, int] = {}
        while True:
            while len(pending) < jobs and (entry := next(waiting, None)) is not None:
                number, task = entry
                pending[remote.remote(task)] = number
            if not pending:
                return
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            yield pending.pop(done), result
    finally:
        if started:
            ray.shutdown()


def _join_cluster(ray: Any, jobs: int) -> bool:
    """Connect where RAY_ADDRESS says, else start a small cluster here; whether there was none before."""
    import os

    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="error")
    else:
        ray.init(
            num_cpus=jobs,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
        )
    return True
