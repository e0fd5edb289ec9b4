"""More requests than the workers can serve, and more connections than the usual limit of open files."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from gateway_processes import SECONDS, call, chat, fake, metric, nothing_left, running, wait_for

ROOT = Path(__file__).resolve().parents[1]


def test_three_times_what_the_workers_can_serve() -> None:
    """The short form of `python -m benchmarks.gateway.overload`, which reports exact figures."""
    command = [sys.executable, "-m", "benchmarks.gateway.overload", "--seconds=5", "--slots=10", "--json"]
    done = subprocess.run(
        [*command, "--", "--max-concurrent-requests=20", "--queue-size=20"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["offered"] > 2 * found["capacity"] > 0
    assert found["odd"] == {}, "whole answers, or 429 and 503 with Retry-After"
    assert sum(found["refused"].values()) > found["served"] / 2
    assert found["goodput_over_capacity"] > 0.5, "beyond capacity it serves what it can"
    assert found["latency_p99"] < 6, "the queue is bounded, so is the wait in it (without: 10 s)"
    assert found["rss_most"] - found["rss_before"] < 48 << 20


def test_more_connections_than_the_usual_limit_of_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this system allows no more than {hard} open files")
    worker = fake("hang")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # inherited by the gateway
    try:
        with running([worker], "--first-byte-timeout=300") as gateway:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1024), hard))
            body = json.dumps(chat()).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            host, port = gateway.url.removeprefix("http://").split(":")
            clients = [socket.create_connection((host, int(port)), timeout=SECONDS) for _ in range(300)]
            for sock in clients:
                sock.sendall(head + body)
            wait_for(lambda: metric(gateway.url, "kvist_active_requests") == 300)
            assert call(gateway.url, "/health")[0] == 200
            for sock in clients:
                sock.close()
            nothing_left(gateway)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
