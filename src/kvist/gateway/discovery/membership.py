"""Keeps a fleet in step with several sources of workers.

What a source no longer names is removed (requests in flight there run to their end), unless another source
names it too. Workers that were added through the API belong to no source and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from kvist.gateway.fleet import Fleet
from kvist.gateway.settings import WorkerSpec


class Membership:
    def __init__(self, fleet: Fleet, now: Callable[[], float], log: Callable[..., None]) -> None:
        self.fleet = fleet
        self.now = now
        self.log = log
        self._named: dict[str, set[str]] = {}  # source -> URLs

    def update(
        self, source: str, specs: Iterable[WorkerSpec], resting: Collection[str] = (), *, strict: bool = False
    ) -> None:
        """These are the workers that the source names now; those `resting` get nothing new.

        Changes are logged. One that cannot be added is left out, or raises ValueError if `strict`, which is
        for what was given at start-up.
        """
        wanted = {spec.url: spec for spec in specs}
        before = self._named.get(source, set())
        self._named[source] = set(wanted)
        others = set().union(*(urls for name, urls in self._named.items() if name != source))
        for url in sorted(before - set(wanted) - others):
            if url in self.fleet.workers:
                self.fleet.remove(url, self.now())
                self.log("worker gone", worker=url, source=source)
        for url, spec in wanted.items():
            if url not in self.fleet.workers and url not in resting:
                try:
                    self.fleet.add(spec, self.now())
                except ValueError as error:
                    if strict:
                        raise
                    self.log("worker refused", worker=url, source=source, error=str(error))
                    continue
                if not strict:
                    self.log("worker", worker=url, source=source)
            worker = self.fleet.workers.get(url)
            if worker is not None and worker.draining != (url in resting):
                self.fleet.drain(url, url in resting)
