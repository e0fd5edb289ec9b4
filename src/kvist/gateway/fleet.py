"""The workers: who is there, what they serve, who is healthy, and the router over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from kvist.gateway.breaker import Breaker
from kvist.gateway.knowledge.believed import BelievedIndex
from kvist.gateway.knowledge.load import Report, read
from kvist.gateway.knowledge.subscriber import Subscriptions
from kvist.gateway.settings import Settings, WorkerSpec
from kvist.http.client import Pool, fetch
from kvist.prefix.base import PrefixKnowledge
from kvist.routing import Router, RoutingPolicy


class Worker:
    """One worker: its connections, breaker, health and the models it announced."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.id = url
        self.pool = Pool(url)
        self.breaker = Breaker(settings.cb_failure_threshold, settings.cb_timeout_duration)
        self.models: frozenset[str] = frozenset()  # empty: not known yet, takes any
        self.adapters: dict[str, str] = {}  # those of the models that are LoRA adapters -> their base
        self.report: Report | None = None  # its latest /metrics, where they are read
        self.tells_cached = False  # its answers' usage counts cached tokens
        self.healthy = True
        self.draining = False
        self.checks = 0  # in a row, of the kind that would change `healthy`
        self.head = b"host: " + self.pool.authority + b"\r\n"
        if settings.worker_api_key:
            self.head += b"authorization: Bearer " + settings.worker_api_key.encode() + b"\r\n"

    def serves(self, model: str) -> bool:
        """By what it announced. SGLang also takes BASE:ADAPTER, and may load the adapter on demand."""
        return not self.models or model in self.models or model.partition(":")[0] in self.models


class Fleet:
    """Add, drop and drain workers; health checks never touch load or counters."""

    def __init__(
        self,
        settings: Settings,
        policy: RoutingPolicy,
        index: PrefixKnowledge,
        subscriptions: Subscriptions | None = None,
        forget: Callable[[int], None] = lambda slot: None,
    ) -> None:
        self.settings = settings
        self._forget = forget  # drops what decisions alone made us believe of a worker's cache
        self.subscriptions = subscriptions
        self.router = Router(policy, index=index)
        self.workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._allowed: dict[str, frozenset[str]] = {}
        self._adapters: dict[str, str] = {}

    def add(self, given: WorkerSpec | str, now: float) -> Worker:
        """Raises ValueError for a malformed or known URL, or a malformed address of KV events."""
        spec = self.settings.spec(given) if isinstance(given, str) else given
        url = spec.url
        if url in self.workers:
            raise ValueError(f"worker {url} is there already")
        if spec.kv_events and self.subscriptions is None:
            raise ValueError("kv_events: start the gateway with --kv-events to follow any")
        worker = Worker(url, self.settings)
        state = self.router.add_worker(url, now)
        if self.subscriptions is not None:
            try:
                self.subscriptions.add(spec, state.slot)
            except ValueError:
                self.router.remove_worker(url, now)
                raise
        self.workers[url] = worker
        self._allowed.clear()
        self._tasks[url] = asyncio.get_running_loop().create_task(self._watch(worker))
        if self.settings.metrics_interval:
            self._readers[url] = asyncio.get_running_loop().create_task(self._read_metrics(worker))
        return worker

    def remove(self, url: str, now: float) -> None:
        """Forget a worker; requests in flight on it run to their end. Raises KeyError."""
        worker = self.workers.pop(url)
        worker.draining = True
        if self.subscriptions is not None:
            self.subscriptions.remove(self.router.worker(url).slot)
        self.router.remove_worker(url, now)
        self._tasks.pop(url).cancel()
        if url in self._readers:
            self._readers.pop(url).cancel()
        self._allowed.clear()
        worker.pool.retire()

    def drain(self, url: str, draining: bool = True) -> None:
        """Send nothing new to a worker (or do again). Raises KeyError."""
        self.workers[url].draining = draining
        self._allowed.clear()

    def adapters(self) -> Mapping[str, str]:
        """The models that are LoRA adapters, and the models they adapt."""
        return self._adapters

    def serves(self, model: str) -> bool:
        """Whether any worker, healthy or not, may serve the model."""
        if self._allowed.get(model):  # the usual case: asked before
            return True
        return any(w.serves(model) for w in self.workers.values())

    def allowed(self, model: str, now: float, without: Collection[str] = ()) -> frozenset[str]:
        """Workers that may take a request for the model now."""
        found = self._allowed.get(model)
        if found is None:
            found = frozenset(
                w.id
                for w in self.workers.values()
                if w.healthy and not w.draining and (not model or w.serves(model))
            )
            if len(self._allowed) < 1000:  # model names come from clients
                self._allowed[model] = found
        tripped = [w for w in found if self.workers[w].breaker.opened_at is not None]
        closed = [w for w in tripped if not self.workers[w].breaker.allows(now)]
        return found.difference(closed, without) if closed or without else found

    def models(self) -> list[dict[str, Any]]:
        """The models of all workers, merged, in the shape of the OpenAI API."""
        names = sorted({name for worker in self.workers.values() for name in worker.models})
        return [{"id": name, "object": "model", "created": 0, "owned_by": "kvist"} for name in names]

    def rows(self) -> list[dict[str, Any]]:
        """State of every worker, for /workers, metrics and the dashboard."""
        now = time.monotonic()
        states = {state.id: state for state in self.router.workers}
        health = self.router.policy.health()
        return [
            {
                "id": worker.id,
                "models": sorted(worker.models),
                "healthy": worker.healthy,
                "draining": worker.draining,
                "breaker": worker.breaker.state(now),
                "in_flight": states[worker.id].in_flight,
                "pending_prefill": states[worker.id].pending_prefill,
                "load": states[worker.id].load,
                "routed": states[worker.id].routed,
                "index_tokens": self.router.index.cached_tokens(states[worker.id].slot),
                "knows": self._knows(states[worker.id].slot),
                "upstream_connections": worker.pool.open,
                "others": states[worker.id].others,
                "predictions": health.get(worker.id),
                **_told(worker.report or Report()),
            }
            for worker in self.workers.values()
        ]

    def _knows(self, slot: int) -> str:
        """What the index of a worker rests on: own decisions, or KV events and how far they reach."""
        index = self.router.index
        return str(index.state(slot)) if isinstance(index, BelievedIndex) else "own"

    def close(self) -> None:
        for task in (*self._tasks.values(), *self._readers.values()):
            task.cancel()
        for worker in self.workers.values():
            worker.pool.close()

    async def _watch(self, worker: Worker) -> None:
        """Learn a worker's models, then check its health now and then."""
        settings = self.settings
        while True:
            try:
                status, _ = await fetch(
                    worker.pool, settings.health_check_endpoint, seconds=settings.health_check_timeout
                )
                good = status < 400
                if good and (not worker.models or not worker.healthy):
                    await self._learn_models(worker)
            except (OSError, TimeoutError) as error:
                good = False
                if isinstance(error, ConnectionRefusedError):
                    self.gone(worker)
            self._checked(worker, good)
            await asyncio.sleep(settings.health_check_interval)

    async def _read_metrics(self, worker: Worker) -> None:
        """Learn a worker's capacity and load from its own /metrics, now and then."""
        while True:
            report = None  # what is old says nothing
            try:
                status, text = await fetch(
                    worker.pool, "/metrics", seconds=self.settings.health_check_timeout, headers=self._auth()
                )
                if status == 200:
                    report = read(text)
            except (OSError, TimeoutError):
                pass
            worker.report = report
            self._reported(worker)
            await asyncio.sleep(self.settings.metrics_interval)

    def _reported(self, worker: Worker) -> None:
        report = worker.report or Report()
        state = self.router.worker(worker.id)
        state.others = max((report.requests or 0) - state.in_flight, 0)
        if report.capacity and report.capacity != state.capacity:
            self.router.set_capacity(worker.id, report.capacity)

    def _auth(self) -> list[tuple[bytes, bytes]]:
        key = self.settings.worker_api_key
        return [(b"authorization", b"Bearer " + key.encode())] if key else []

    def gone(self, worker: Worker) -> None:
        """Nothing listens there: the engine's process has ended, and its cache with it."""
        if worker.id in self.workers:
            state = self.router.worker(worker.id)
            self._forget(state.slot)
            state.cached_tokens = 0

    def _checked(self, worker: Worker, good: bool) -> None:
        if good == worker.healthy:
            worker.checks = 0
            return
        worker.checks += 1
        settings = self.settings
        needed = settings.health_success_threshold if good else settings.health_failure_threshold
        if worker.checks >= needed:
            worker.healthy, worker.checks = good, 0
            self._allowed.clear()
            if good:
                worker.breaker.succeeded()

    async def _learn_models(self, worker: Worker) -> None:
        status, body = await fetch(
            worker.pool, "/v1/models", seconds=self.settings.health_check_timeout, headers=self._auth()
        )
        if status != 200:
            return
        try:
            data = msgspec.json.decode(body)["data"]
            worker.models = frozenset(str(entry["id"]) for entry in data)
            worker.adapters = {str(e["id"]): str(e["parent"]) for e in data if e.get("parent")}
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            return
        self._adapters = {name: base for w in self.workers.values() for name, base in w.adapters.items()}
        self._allowed.clear()


def _told(report: Report) -> dict[str, Any]:
    """For a row: None where the worker's /metrics are not read or do not say."""
    return {
        "running": report.running,
        "waiting": report.waiting,
        "kv_usage": report.kv_usage,
        "capacity": report.capacity,
    }
