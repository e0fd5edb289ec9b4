"""OpenTelemetry traces: one span for each request, continued from the client's and passed on to the worker.

Sampling, resource and headers follow the SDK's own OTEL_ environment variables. Names are OpenTelemetry's
conventions for HTTP and generative AI where they have one, else `kvist.…`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvist.routing import Outcome, Ticket

if TYPE_CHECKING:
    from kvist.gateway.exchange import Exchange

CONTEXT = (b"traceparent", b"tracestate")  # W3C trace context


class Tracing:
    """`endpoint`: where OTLP as JSON over HTTP goes, as http://127.0.0.1:4318/v1/traces.

    Raises ModuleNotFoundError without the extra.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.json.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"traces: {error}: pip install 'kvist[otel]'") from None
        resource = Resource.create({"service.name": "kvist"})  # OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("kvist.gateway")
        self._context = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(self, exchange: Exchange, now: float) -> Any:
        """The request's span; from here on its context goes to the worker in place of the client's."""
        request, query = exchange.request, exchange.query
        given = {name.decode(): v.decode("latin-1") for name, v in request.headers if name in CONTEXT}
        waited = now - exchange.started
        span = self._tracer.start_span(
            f"POST {request.path}",
            self._context.extract(given),
            kind=self._trace.SpanKind.SERVER,
            start_time=time.time_ns() - int(waited * 1e9),
            attributes={
                "http.request.method": "POST",
                "url.path": request.path,
                "gen_ai.request.model": query.model,
                "kvist.stream": exchange.stream,
                "kvist.waited": waited,
            },
        )
        carrier: dict[str, str] = {}
        self._context.inject(carrier, self._trace.set_span_in_context(span))
        request.headers = [header for header in request.headers if header[0] not in CONTEXT]
        request.headers += [(name.encode(), value.encode("latin-1")) for name, value in carrier.items()]
        return span

    def tried(self, span: Any, ticket: Ticket, outcome: Outcome) -> None:
        """A worker was tried; the last one's figures stay on the span."""
        decision = ticket.decision
        found = {
            "kvist.worker": decision.worker,
            "kvist.policy": ticket.policy.name,
            "kvist.reason": decision.reason,
            "kvist.outcome": str(outcome.status),
            "kvist.prompt_length": ticket.query.length,
            "kvist.cached.expected": decision.cached,
            "kvist.cached.counted": outcome.cached_tokens,
            "kvist.latency.predicted": decision.predicted,
            "kvist.latency": outcome.latency,
            "kvist.ttft": outcome.ttft,
            "gen_ai.usage.output_tokens": outcome.output_tokens or None,
        }
        told = {name: value for name, value in found.items() if value is not None}
        span.set_attributes(told)
        span.add_event("worker", {"kvist.worker": decision.worker, "kvist.outcome": str(outcome.status)})

    def end(self, span: Any, status: int) -> None:
        """`status` is the HTTP status that the client saw, 0 if it left before."""
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left; may take some seconds if nobody answers."""
        self._provider.shutdown()
