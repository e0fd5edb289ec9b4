"""The picker's small HTTP side: metrics, health and the state of the endpoints, for people and Prometheus."""

from __future__ import annotations

from typing import Any

import msgspec

from kvist.gateway.metrics import Collector, exposition
from kvist.http.server import Connection, Connections, Request, error_body
from kvist.picker.core import Picker
from kvist.picker.server import Services

_JSON = b"application/json"


class Admin:
    """GET /metrics, /health and /workers."""

    def __init__(self, picker: Picker, fleet: Any, services: Services, sharing: Any = None) -> None:
        self.picker = picker
        self.services = services
        self.sharing = sharing
        self.fleet = fleet
        self.connections = Connections(self.handle)
        self.collector = Collector(picker.metrics, self)

    # What the collector reads
    @property
    def admission(self) -> Any:
        return self.picker.admission

    @property
    def open_clients(self) -> int:
        return len(self.services.connections)

    @property
    def knowledge(self) -> Any:
        return self.fleet.knowledge

    def handle(self, request: Request, client: Connection) -> None:
        if request.method != b"GET":
            client.respond(405, error_body(405, "method not allowed"), kind=_JSON)
        elif request.path == "/metrics":
            text = exposition(self.collector)
            client.respond(200, text, kind=b"text/plain; version=0.0.4; charset=utf-8")
        elif request.path == "/health":
            ready = self.services.ready
            client.respond(
                200 if ready else 503,
                msgspec.json.encode({"status": "ok" if ready else "not ready"}),
                kind=_JSON,
            )
        elif request.path == "/workers":
            client.respond(200, msgspec.json.encode(self.state()), kind=_JSON)
        else:
            client.respond(404, error_body(404, f"no such path: {request.path}"), kind=_JSON)

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.fleet.router.policy.name,
            "streams": len(self.services.open),
            "active": self.picker.admission.active,
            "queued": self.picker.admission.waiting,
            "objectives": self.picker.objectives,
            "workers": self.fleet.rows(),
        }
