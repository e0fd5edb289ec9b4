"""Run a gateway: socket, signals, sweeps, snapshots, draining."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kvist.gateway import snapshot
from kvist.gateway.app import Gateway
from kvist.gateway.auth import Keys
from kvist.gateway.discovery.discovery import Discovery
from kvist.gateway.discovery.membership import Membership
from kvist.gateway.exporter import Exporter
from kvist.gateway.settings import Settings
from kvist.http.files import allow_many
from kvist.http.garbage import Garbage
from kvist.http.server import Connection

SWEEP_SECONDS = 0.2


def log_json(event: str, **fields: Any) -> None:
    """One JSON object a line on standard error."""
    sys.stderr.write(msgspec.json.encode({"event": event, **fields}).decode() + "\n")


async def serve(
    settings: Settings,
    *,
    reload: Callable[[], Settings] | None = None,
    ready: Callable[[int], None] = lambda port: None,
    log: Callable[..., None] = log_json,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. SIGHUP takes workers and keys from `reload`.

    `ready` is told the port once it listens. Raises OSError if the address is taken.
    """
    gateway = Gateway(settings, log=log)
    path = Path(settings.snapshot) if settings.snapshot else None
    if path is not None and snapshot.load(gateway.fleet.router.policy, path):
        log("restored", snapshot=str(path))
    discovery = Discovery(Membership(gateway.fleet, gateway.now, log), log)
    discovery.apply(settings, strict=True)
    own, workers = gateway.knowledge.own, gateway.fleet.router.workers
    if path is not None and settings.snapshot_index and snapshot.load_index(own, workers, path):
        log("restored", index=str(snapshot.index_file(path)))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(gateway.connections),
        settings.host,
        settings.port,
        ssl=_tls(settings),
        backlog=4096,
    )
    exporter = Exporter(gateway)
    if settings.prometheus_port:
        await exporter.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if reload is not None:
        loop.add_signal_handler(signal.SIGHUP, _reload, gateway, discovery, reload, log)
    port = server.sockets[0].getsockname()[1]
    log("listening", host=settings.host, port=port, workers=len(gateway.fleet.workers), open=_open(settings))
    discovery.follow_names(settings)
    if settings.service_discovery:
        await discovery.follow_pods(settings)
    ready(port)
    beside = [loop.create_task(_sweep(gateway, exporter, path, log))]
    if gateway.sharing is not None:
        beside.append(loop.create_task(gateway.sharing.run()))
    await stop.wait()
    await _drain(gateway, server, log)
    for task in beside:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    if path is not None:
        snapshot.save(gateway.fleet.router.policy, path)
        if settings.snapshot_index:
            snapshot.save_index(own, gateway.fleet.router.workers, path)
    discovery.close()
    exporter.close()
    gateway.fleet.close()
    gateway.knowledge.close()
    if gateway.tracing is not None:
        gateway.tracing.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)


def _open(settings: Settings) -> str:
    """One line on who may do what."""
    api = "API keys needed" if settings.api_keys else "anyone who can reach it may send requests"
    admin = "admin key needed" if settings.admin_key else "administration as open as requests"
    return f"{api}; {admin}; {'TLS' if settings.tls_cert else 'plain HTTP'}"


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"tls_cert {settings.tls_cert}, tls_key {settings.tls_key}: {error}") from None
    return context


async def _sweep(gateway: Gateway, exporter: Exporter, path: Path | None, log: Callable[..., None]) -> None:
    saved = gateway.now()
    garbage = Garbage(saved)
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        gateway.sweep()
        exporter.connections.sweep(gateway.now())
        garbage.sweep(gateway.now(), idle=not gateway.admission.active)
        if path is not None and gateway.now() - saved > gateway.settings.snapshot_interval:
            saved = gateway.now()
            try:
                snapshot.save(gateway.fleet.router.policy, path)
            except OSError as error:
                log("snapshot failed", error=str(error))


async def _drain(gateway: Gateway, server: asyncio.Server, log: Callable[..., None]) -> None:
    """Take no new connections; let requests under way end, up to the drain timeout."""
    log("draining", active=gateway.admission.active)
    server.close()
    gateway.connections.closing = True
    until = gateway.now() + gateway.settings.drain_timeout
    while (gateway.admission.active or gateway.admission.waiting) and gateway.now() < until:
        await asyncio.sleep(0.05)
    for connection in list(gateway.connections.open):
        connection.transport.close() if connection.request is None else connection.abort()
    await asyncio.sleep(0)
    log("stopped", active=gateway.admission.active)


def _reload(
    gateway: Gateway, discovery: Discovery, reload: Callable[[], Settings], log: Callable[..., None]
) -> None:
    """Take over workers and keys; anything else needs a restart. Bad settings change nothing."""
    try:
        settings = reload()
        keys = Keys(settings.api_keys)
        admin = Keys([settings.admin_key] if settings.admin_key else [])
    except ValueError as error:
        log("reload failed", error=str(error))
        return
    gateway.keys, gateway.admin = keys, admin
    discovery.apply(settings)
    discovery.follow_names(settings)
    log("reloaded", workers=len(gateway.fleet.workers))


def run(settings: Settings, reload: Callable[[], Settings] | None = None) -> None:
    """`serve` in an event loop of its own, uvloop where it is installed."""
    allow_many()
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(serve(settings, reload=reload))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, reload=reload))
