"""Run a picker: sockets, discovery, sweeps, signals, draining."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvist.gateway import snapshot
from kvist.gateway.serve import SWEEP_SECONDS, log_json
from kvist.gateway.sharing.redis import over_redis
from kvist.http.garbage import Garbage
from kvist.http.server import Connection as HttpConnection
from kvist.picker.admin import Admin
from kvist.picker.core import Picker
from kvist.picker.endpoints import EndpointFleet
from kvist.picker.server import Services
from kvist.picker.settings import PickerSettings
from kvist.picker.tls import server_context


async def serve(
    settings: PickerSettings,
    *,
    ready: Callable[[int], None] = lambda port: None,
    log: Callable[..., None] = log_json,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `ready` is told the gRPC port once it listens.

    Raises OSError if an address is taken, ValueError for a snapshot or certificate that does not fit.
    """
    context = server_context(settings)
    fleet = EndpointFleet(settings, log)
    tokens = fleet.knowledge.tokens
    picker = Picker(settings, fleet, time.monotonic, log, tokens.prepare if tokens is not None else None)
    path = Path(settings.snapshot) if settings.snapshot else None
    if path is not None and snapshot.load(fleet.router.policy, path):
        log("restored", snapshot=str(path))
    services = Services(picker, log)
    sharing = over_redis(settings, fleet.router, log)
    admin = Admin(picker, fleet, services, sharing)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    servers: list[asyncio.Server] = []

    async def listen(make: Callable[[], Any], port: int, tls: ssl.SSLContext | None = None) -> int:
        servers.append(await loop.create_server(make, settings.host, port, ssl=tls, backlog=4096))
        return int(servers[-1].sockets[0].getsockname()[1])

    tasks = [loop.create_task(_sweep(picker, fleet, admin, path, log))]
    if sharing is not None:
        tasks.append(loop.create_task(sharing.run()))
    try:
        port = await listen(services.protocol, settings.grpc_port, context)
        metrics = await listen(lambda: HttpConnection(admin.connections), settings.metrics_port)
        health = 0
        if settings.grpc_health_port:
            health = await listen(services.health_protocol, settings.grpc_health_port)
        log(
            "listening",
            host=settings.host,
            port=port,
            metrics_port=metrics,
            health_port=health,
            policy=settings.policy,
            tls=context is not None,
        )
        if settings.pool_name:
            from kvist.picker.kube import watch_pool

            tasks.append(loop.create_task(watch_pool(settings, picker, fleet, services, log)))
        else:
            fleet.replace(dict.fromkeys(settings.endpoints, True), time.monotonic())
            services.set_ready(True)
        ready(port)
        await _until(stop, tasks)
        await _drain(services, picker, servers, log)
    finally:
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fleet.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    if path is not None:
        snapshot.save(fleet.router.policy, path)


async def _until(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Until a signal; a task that breaks breaks the picker."""
    waiting = asyncio.ensure_future(stop.wait())
    await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for task in tasks:
        if task.done():
            task.result()


async def _drain(
    services: Services, picker: Picker, servers: list[asyncio.Server], log: Callable[..., None]
) -> None:
    """Fail the health check first, then refuse new streams, then let those under way end."""
    settings = picker.settings
    log("draining", streams=len(services.open))
    until = time.monotonic() + settings.drain_timeout
    services.set_ready(False)
    await asyncio.sleep(min(settings.drain_notice, settings.drain_timeout))
    for server in servers:
        server.close()
    services.go_away()
    while services.open and time.monotonic() < until:
        await asyncio.sleep(0.05)
    log("stopped", streams=len(services.open), active=picker.admission.active)


async def _sweep(
    picker: Picker, fleet: EndpointFleet, admin: Admin, path: Path | None, log: Callable[..., None]
) -> None:
    saved = time.monotonic()
    garbage = Garbage(saved)
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        now = time.monotonic()
        picker.sweep(now)
        garbage.sweep(now, idle=not picker.admission.active)
        admin.connections.sweep(now)
        for worker in fleet.workers.values():
            worker.pool.sweep(now)
        if path is not None and now - saved > picker.settings.snapshot_interval:
            saved = now
            with contextlib.suppress(OSError):
                snapshot.save(fleet.router.policy, path)


def run(settings: PickerSettings, ready: Callable[[int], None] = lambda port: None) -> None:
    """`serve` in an event loop of its own, uvloop where it is installed."""
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(serve(settings, ready=ready))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, ready=ready))
