"""/metrics on a port of its own, for a Prometheus that has no key."""

from __future__ import annotations

import asyncio

from kvist.gateway.app import Gateway
from kvist.gateway.exchange import JSON
from kvist.http.server import Connection, Connections, Limits, Request, error_body


class Exporter:
    """Raises OSError if the address is taken."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.connections = Connections(self._handle, Limits(max_body=1024))
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; the port."""
        settings = self.gateway.settings
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self.connections),
            settings.prometheus_host or settings.host,
            settings.prometheus_port,
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def _handle(self, request: Request, client: Connection) -> None:
        if (request.method, request.path) == (b"GET", "/metrics"):
            self.gateway.respond_metrics(client)
        else:
            client.respond(404, error_body(404, f"no such path: {request.path}"), kind=JSON)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections.open):
            connection.abort()
