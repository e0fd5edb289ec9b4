"""The picker's gRPC services on `kvist.http.grpc`: external processing and health."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from kvist.http import call, grpc
from kvist.picker.core import Picker
from kvist.picker.exchange import Exchange
from kvist.picker.protocol import SERVICE

# Names of the protocol's health checks, and of the older reference picker's.
HEALTH_NAMES = ("", "liveness", "readiness", SERVICE, "inference-extension")


class Process:
    """One `ExternalProcessor.Process` stream: one HTTP request of a client."""

    __slots__ = ("_exchange", "_services", "_stream")

    def __init__(self, services: Services, stream: call.Stream) -> None:
        self._services = services
        self._stream = stream
        self._exchange = Exchange(services.picker, self._resume)
        services.open.add(self)

    def message(self, data: bytes) -> None:
        exchange = self._exchange
        try:
            out = exchange.receive(data, self._services.now())
        except ValueError as error:
            self._end(call.INVALID_ARGUMENT, str(error))
            return
        for message in out:
            self._stream.send(message)
        if exchange.closed:
            self._end()

    def _resume(self) -> None:
        for message in self._exchange.resume():
            self._stream.send(message)
        if self._exchange.closed:
            self._end()

    def half_closed(self) -> None:
        self._end()

    def lost(self) -> None:
        self._services.open.discard(self)
        self._exchange.close(self._services.now())

    def _end(self, status: int = call.OK, text: str = "") -> None:
        self.lost()
        self._stream.finish(status, text)


class Health:
    """`grpc.health.v1.Health.Check`, and `Watch` for those who want to be told."""

    __slots__ = ("_name", "_services", "_stream", "_watch")

    def __init__(self, services: Services, stream: call.Stream, watch: bool) -> None:
        self._services = services
        self._stream = stream
        self._watch = watch
        self._name = ""

    def message(self, data: bytes) -> None:
        from google.protobuf.message import DecodeError
        from grpc_health.v1.health_pb2 import HealthCheckRequest

        try:
            self._name = str(HealthCheckRequest.FromString(data).service)
        except DecodeError as error:
            self._stream.finish(call.INVALID_ARGUMENT, str(error))
            return
        if self._watch:
            self._services.watchers.add(self)
            self.tell()
        elif self._name in HEALTH_NAMES:
            self.tell()
            self._stream.finish()
        else:
            self._stream.finish(call.NOT_FOUND, "no such service")

    def tell(self) -> None:
        from grpc_health.v1.health_pb2 import HealthCheckResponse as Response

        known = self._name in HEALTH_NAMES
        serving = self._services.serving(self._name)
        status = Response.SERVING if serving else Response.NOT_SERVING
        self._stream.send(Response(status=status if known else Response.SERVICE_UNKNOWN).SerializeToString())

    def half_closed(self) -> None: ...

    def lost(self) -> None:
        self._services.watchers.discard(self)


class Services:
    """What a picker answers over gRPC. `ready`: discovery has answered once, and nobody stops us."""

    def __init__(self, picker: Picker, log: Callable[..., None] = lambda event, **fields: None) -> None:
        self.picker = picker
        self.log = log
        self.now = time.monotonic
        self.ready = False
        self.open: set[Process] = set()
        self.watchers: set[Health] = set()
        self.connections: set[grpc.Connection] = set()
        health = b"/grpc.health.v1.Health/"
        self._health: dict[bytes, Callable[[call.Stream], call.Handler]] = {
            health + b"Check": lambda stream: Health(self, stream, watch=False),
            health + b"Watch": lambda stream: Health(self, stream, watch=True),
        }
        self._calls: dict[bytes, Callable[[call.Stream], call.Handler]] = {
            f"/{SERVICE}/Process".encode(): lambda stream: Process(self, stream),
            **self._health,
        }

    def protocol(self) -> grpc.Connection:
        return grpc.Connection(self._calls, self.connections, self._broken)

    def health_protocol(self) -> grpc.Connection:
        return grpc.Connection(self._health, self.connections, self._broken)

    def _broken(self, error: Exception) -> None:
        """A bug: it costs one request, and is told of."""
        trace = "".join(traceback.format_exception(error)[-3:])
        self.log("internal error", error=f"{type(error).__name__}: {error}", trace=trace)

    def serving(self, name: str) -> bool:
        return self.ready or name == "liveness"

    def set_ready(self, ready: bool) -> None:
        if ready is not self.ready:
            self.ready = ready
            for watcher in list(self.watchers):
                watcher.tell()

    def go_away(self) -> None:
        """Let the data plane open no new streams; those under way go on."""
        for watcher in list(self.watchers):
            watcher.lost()
        for connection in list(self.connections):
            connection.go_away()
