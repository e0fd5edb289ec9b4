"""Traces, request ids, the metrics port, models by name, the index across a restart, in real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gateway_processes import (
    SECONDS,
    Process,
    call,
    chat,
    engine,
    fake,
    free_port,
    metric,
    running,
    state,
    wait_for,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Sink:
    """An HTTP server that keeps what it is sent: headers and bodies."""

    def __init__(self, answer: bytes = b"") -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.command == "POST":
                    sink.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def spans(sink: Sink) -> list[dict[str, Any]]:
    """All spans that were exported, with their attributes as a dict."""
    found = []
    for _, body in sink.requests:
        for resource in json.loads(body)["resourceSpans"]:
            assert value(resource["resource"]["attributes"], "service.name") == "kvist"
            for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                found.append(
                    {
                        **{
                            pair["key"]: value(span["attributes"], pair["key"]) for pair in span["attributes"]
                        },
                        "name": span["name"],
                        "trace": span["traceId"],
                        "parent": span.get("parentSpanId", ""),
                        "span": span["spanId"],
                        "seconds": (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e9,
                        "events": [event["name"] for event in span["events"]],
                    }
                )
    return found


def keys(attributes: list[dict[str, Any]]) -> list[str]:
    return [pair["key"] for pair in attributes]


def value(attributes: list[dict[str, Any]], key: str) -> Any:
    (found,) = (pair["value"] for pair in attributes if pair["key"] == key)
    ((kind, given),) = found.items()
    return int(given) if kind == "intValue" else given


def test_a_span_continues_the_clients_trace_and_is_passed_on() -> None:
    pytest.importorskip("opentelemetry.sdk")
    collector, worker = Sink(), Sink(b'{"usage":{"prompt_tokens":10,"completion_tokens":3}}')
    gateway = Process(
        *("-m", "kvist", "serve", "--port=0", f"--worker-urls={worker.url}", "--log-requests"),
        f"--otlp-traces-endpoint={collector.url}/v1/traces",
    )
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        parent = f"00-{TRACE}-b7ad6b7169203331-01"
        call(gateway.url, "/v1/chat/completions", chat("x", model="m"), traceparent=parent, tracestate="a=1")
        call(gateway.url, "/v1/chat/completions", chat("y"))
        passed = [headers for headers, _ in worker.requests]
        gateway.signal(signal.SIGTERM)
        assert gateway.process.wait(SECONDS) == 0, "what is left is sent before the end"
        first, second = spans(collector)
        assert first["trace"] == TRACE and first["parent"] == "b7ad6b7169203331"
        assert passed[0]["traceparent"] == f"00-{TRACE}-{first['span']}-01"
        assert passed[0]["tracestate"] == "a=1"
        assert passed[1]["traceparent"].startswith(f"00-{second['trace']}-{second['span']}-0")
        assert second["parent"] == "" and second["trace"] != TRACE
        assert first["kvist.worker"] == worker.url and first["kvist.policy"] == "lbgr"
        assert first["http.response.status_code"] == 200 and first["gen_ai.request.model"] == "m"
        assert first["kvist.outcome"] == "ok" and first["gen_ai.usage.output_tokens"] == 3
        assert (
            first["kvist.latency.predicted"] > 0
            and 0 < first["seconds"] < SECONDS
            and first["events"] == ["worker"]
        )
        lines = [json.loads(line) for line in gateway.lines if '"request"' in line]
        assert lines[0]["trace_id"] == TRACE and "y" not in json.dumps(lines[1]["path"]).split("/")
    finally:
        gateway.stop()
        collector.stop()
        worker.stop()


def test_failed_attempts_are_events_of_one_span() -> None:
    pytest.importorskip("opentelemetry.sdk")
    collector, workers = Sink(), [fake("error"), fake("error")]
    try:
        with running(workers, f"--otlp-traces-endpoint={collector.url}", "--retry-max-retries=1") as gateway:
            assert call(gateway.url, "/v1/chat/completions", chat("x"))[0] == 500
            gateway.signal(signal.SIGTERM)
            gateway.process.wait(SECONDS)
        (span,) = spans(collector)
        assert span["events"] == ["worker", "worker"] and span["http.response.status_code"] == 500
        assert span["kvist.outcome"] == "failed"
    finally:
        collector.stop()


def test_without_traces_the_clients_context_passes_untouched() -> None:
    worker = Sink(b"{}")
    gateway = Process("-m", "kvist", "serve", "--port=0", f"--worker-urls={worker.url}")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        call(gateway.url, "/v1/chat/completions", chat("x"), traceparent="anything", x_request_id="mine")
        headers, _ = worker.requests[0]
        assert headers["traceparent"] == "anything" and headers["x-request-id"] == "mine"
    finally:
        gateway.stop()
        worker.stop()


def test_logged_requests_have_ids_that_worker_and_client_see_too() -> None:
    worker = Sink(b"{}")
    gateway = Process("-m", "kvist", "serve", "--port=0", f"--worker-urls={worker.url}", "--log-requests")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        made = call(gateway.url, "/v1/chat/completions", chat("secret words"))[2]["x-request-id"]
        assert len(made) == 32
        given = call(gateway.url, "/v1/chat/completions", chat("x"), x_request_id="mine")[2]["x-request-id"]
        assert given == "mine"
        assert [headers["x-request-id"] for headers, _ in worker.requests] == [made, "mine"]
        wait_for(lambda: sum('"request_id"' in line for line in gateway.lines) == 2)
        lines = [json.loads(line) for line in gateway.lines if '"request_id"' in line]
        assert [line["request_id"] for line in lines] == [made, "mine"]
        assert lines[0]["event"] == "request" and lines[0]["status"] == "ok"
        assert not any("secret" in line for line in gateway.lines)
    finally:
        gateway.stop()
        worker.stop()


def test_metrics_on_a_port_of_their_own_need_no_key() -> None:
    port = free_port()
    with running([fake()], "--api-key=secret", f"--prometheus-port={port}") as gateway:
        url = f"http://127.0.0.1:{port}"
        assert call(gateway.url, "/metrics")[0] == 401
        assert metric(url, "kvist_client_connections") >= 0
        assert b"kvist_worker_healthy" in call(url, "/metrics")[1]
        for path in ("/workers", "/v1/models", "/"):
            assert call(url, path)[0] == 404


def test_a_model_is_found_by_its_name() -> None:
    with running([fake(), engine("--model=org/name")]) as gateway:

        def names() -> list[str]:
            return [model["id"] for model in json.loads(call(gateway.url, "/v1/models")[1])["data"]]

        wait_for(lambda: names() == ["fake", "org/name"] or names() == ["fake", "tiny"])
        for name in names():
            assert json.loads(call(gateway.url, f"/v1/models/{name}")[1])["id"] == name
        status, body, _ = call(gateway.url, "/v1/models/none")
        assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"


def test_the_index_survives_a_restart(tmp_path: Path) -> None:
    worker = engine()
    options = (f"--worker-urls={worker.url}", f"--snapshot={tmp_path / 'learned'}", "--snapshot-index")
    body = chat("remember this " * 100, model="tiny", max_tokens=1)

    def serve() -> Process:
        gateway = Process("-m", "kvist", "serve", "--port=0", *options)
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        return gateway

    gateway = serve()
    try:
        assert call(gateway.url, "/v1/chat/completions", body)[0] == 200
        held = state(gateway.url)["workers"][0]["index_tokens"]
        gateway.signal(signal.SIGTERM)
        assert gateway.process.wait(SECONDS) == 0
        gateway = serve()
        assert state(gateway.url)["workers"][0]["index_tokens"] == held > 1000
        assert call(gateway.url, "/v1/chat/completions", body)[0] == 200
        assert state(gateway.url)["recent"][-1]["cached"] > 1000
        gateway.stop()
        for more in (["--tokenizer=embedded"], []):
            done = subprocess.run(
                [sys.executable, "-m", "kvist", "serve", "--port=0", *options, *more],
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            assert done.returncode == 2 and "delete it to start afresh" in done.stderr
            (tmp_path / "learned.index").write_bytes(b"\xc1")
    finally:
        gateway.stop()
        worker.stop()
