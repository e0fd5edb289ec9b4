"""What a run is measured by: counters and sketches, of constant size."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.engine.request import Request
from kvist.sim.base import SimConfig, SimResult, WorkerResult
from kvist.sim.metrics import LoadSeries, Sketch
from kvist.sim.worker import Flight, Worker


class Recorder:
    """Told of every event by the cluster; only flights past the warm-up count."""

    def __init__(self, config: SimConfig, start: float) -> None:
        self.config = config
        self.start = start
        self.series = LoadSeries(start, config.points)
        self.ttft, self.tpot, self.latency = Sketch(), Sketch(), Sketch()
        self.arrivals = self.requests = self.done = self.lost = self.refusals = self.reroutes = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.good = 0
        self.first_counted = start
        self.last_end = self.last_counted = start

    def arrived(self, now: float, workers: Sequence[Worker]) -> bool:
        """A query arrives; whether it counts."""
        self.arrivals += 1
        if self.arrivals <= self.config.warmup:
            return False
        if not self.requests:
            self.first_counted = now
            for worker in workers:
                worker.busy_before = worker.engine.stats.busy
        self.requests += 1
        return True

    def load(self, worker: Worker, now: float, delta: int) -> None:
        self.series.change(worker.spec.id, now, delta)

    def completed(self, worker: Worker, flight: Flight, request: Request, now: float) -> None:
        self.last_end = now
        if not flight.counted:
            return
        query = flight.query
        worker.requests += 1
        worker.prompt_tokens += query.length
        worker.cached_tokens += request.cached
        self.done += 1
        self.last_counted = now
        self.prompt_tokens += query.length
        self.cached_tokens += request.cached
        self.output_tokens += query.output_tokens
        assert request.first_token is not None
        ttft = request.first_token - query.arrival
        self.ttft.add(ttft)
        self.latency.add(now - query.arrival)
        tpot = 0.0
        if query.output_tokens > 1:
            tpot = (now - request.first_token) / (query.output_tokens - 1)
            self.tpot.add(tpot)
        if ttft <= self.config.slo_ttft and tpot <= self.config.slo_tpot:
            self.good += 1

    def failed(self, flight: Flight) -> None:
        self.lost += flight.counted

    def refused(self, flight: Flight) -> None:
        self.refusals += flight.counted

    def rerouted(self, flight: Flight) -> None:
        self.reroutes += flight.counted

    def result(self, workers: Sequence[Worker]) -> SimResult:
        span = self.last_counted - self.first_counted
        busy = [worker.engine.stats.busy - worker.busy_before for worker in workers]
        mean = sum(busy) / len(busy) if busy else 0.0
        return SimResult(
            requests=self.requests,
            completed=self.done,
            failed=self.lost,
            refused=self.refusals,
            rerouted=self.reroutes,
            preemptions=sum(worker.engine.stats.preemptions for worker in workers),
            hit_rate=_ratio(self.cached_tokens, self.prompt_tokens),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            ttft=self.ttft.summary(),
            tpot=self.tpot.summary(),
            latency=self.latency.summary(),
            throughput=_ratio(self.done, span),
            output_throughput=_ratio(self.output_tokens, span),
            goodput=_ratio(self.good, span),
            slo_attainment=_ratio(self.good, self.requests),
            imbalance=_ratio(max(busy, default=0.0), mean),
            makespan=self.last_end - self.start,
            workers=tuple(
                WorkerResult(
                    id=worker.spec.id,
                    requests=worker.requests,
                    prompt_tokens=worker.prompt_tokens,
                    cached_tokens=worker.cached_tokens,
                    busy=time,
                    preemptions=worker.engine.stats.preemptions,
                    capacity=worker.engine.cache.capacity,
                )
                for worker, time in zip(workers, busy, strict=True)
            ),
            series=self.series.finish(self.last_end),
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
