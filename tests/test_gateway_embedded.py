"""`kvist serve --embedded N`: engines that start and end with the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gateway_processes import SECONDS, Process, call, chat, state, wait_for


def serve(*options: str) -> Process:
    return Process("-m", "kvist", "serve", "--port=0", "--speed=20", *options)


def children(process: Process) -> list[int]:
    found = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
    return [int(pid) for pid in found.read_text().split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_engines_serve_and_end_with_the_gateway(end: signal.Signals) -> None:
    gateway = serve("--embedded=2", "--eviction=l-lru", "--kv-tokens=4096", "--metrics-interval=0.2")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        engines = children(gateway)
        assert len(engines) == 2
        assert call(gateway.url, "/v1/chat/completions", chat("x", max_tokens=2))[0] == 200
        rows = state(gateway.url)["workers"]
        wait_for(lambda: [row["capacity"] for row in state(gateway.url)["workers"]] == [4096, 4096])
        assert {row["knows"] for row in rows} == {"own"}
        gateway.signal(signal.SIGHUP)
        wait_for(lambda: any("reloaded" in line for line in gateway.lines))
        assert len(state(gateway.url)["workers"]) == 2, "a reload keeps them"
        gateway.signal(end)
        assert gateway.process.wait(SECONDS) == 0
        wait_for(lambda: not any(alive(pid) for pid in engines))
    finally:
        gateway.stop()


def test_with_the_embedded_tokenizer_their_events_are_followed() -> None:
    gateway = serve("--embedded=1", "--tokenizer=embedded")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        for _ in range(2):
            assert call(gateway.url, "/v1/chat/completions", chat("x" * 500, max_tokens=1))[0] == 200
        wait_for(lambda: state(gateway.url)["workers"][0]["knows"] == "exact")
        entry = state(gateway.url)["recent"][-1]
        assert entry["cached"] == entry["cached_true"] > 0
    finally:
        gateway.stop()


def test_a_wrong_option_of_the_engines_ends_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvist", "serve", "--port=0", "--embedded=1", "--eviction=nonsense"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert "embedded engines" in done.stderr and "nonsense" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
