"""Names that resolve to many workers, as a headless service's: `dns+http://HOST:PORT`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import msgspec

from kvist.gateway.discovery.membership import Membership
from kvist.gateway.settings import WorkerSpec

PREFIX = "dns+"
Resolve = Callable[[str], Awaitable[list[str]]]


async def addresses(host: str) -> list[str]:
    """All addresses of a name, sorted. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})


async def follow(
    spec: WorkerSpec,
    membership: Membership,
    interval: float,
    log: Callable[..., None],
    resolve: Resolve = addresses,
) -> None:
    """Look a name up for ever. While it does not resolve, the workers found before stay."""
    parts = urlsplit(spec.url.removeprefix(PREFIX))
    host, port = parts.hostname or "", parts.port or 80
    while True:
        try:
            found = await resolve(host)
        except OSError as error:
            found = []
            log("name does not resolve", name=host, error=str(error))
        if found:
            urls = [f"http://[{ip}]:{port}" if ":" in ip else f"http://{ip}:{port}" for ip in found]
            membership.update(
                spec.url, [msgspec.structs.replace(spec, url=url + parts.path.rstrip("/")) for url in urls]
            )
        await asyncio.sleep(interval)
