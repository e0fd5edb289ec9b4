"""A gateway and workers as real processes on free loopback ports, for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvist.launch.machine import take_ports

FAKE = str(Path(__file__).with_name("fake_worker.py"))

SECONDS = 90.0  # of silence that no slow machine explains


class Process:
    """A child whose first line that names a port is waited for."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._known = threading.Event()
        self._port = 0
        threading.Thread(target=self._read, daemon=True).start()
        assert self._known.wait(120) and self._port, f"{command} did not start: {self.lines}"
        self.url = f"http://127.0.0.1:{self._port}"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r'"port":(\d+)|127\.0\.0\.1:(\d+)|^(\d+)$', line)
            if found and not self._port:
                self._port = int(next(group for group in found.groups() if group))
                self._known.set()
        self._known.set()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def files(self) -> int:
        """Open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def rss(self) -> int:
        """Resident memory in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024


def fake(mode: str = "ok") -> Process:
    return Process(FAKE, "0", mode)


def engine(*options: str) -> Process:
    return Process("-m", "kvist", "engine", "--port=0", "--speed=20", "--model=tiny", *options)


def gateway(workers: list[Process], *options: str) -> Process:
    urls = [word for worker in workers for word in ("--worker-urls", worker.url)]
    return Process("-m", "kvist", "serve", "--port=0", *urls, *options)


@contextmanager
def running(workers: list[Process], *options: str) -> Iterator[Process]:
    """A gateway in front of workers; everything is stopped at the end."""
    with _running(lambda: gateway(workers, *options), workers) as process:
        yield process


@contextmanager
def running_without_urls(workers: list[Process], *options: str) -> Iterator[Process]:
    """As `running`, but the options name the workers."""
    with _running(lambda: gateway([], *options), workers) as process:
        yield process


@contextmanager
def _running(start: Callable[[], Process], workers: list[Process]) -> Iterator[Process]:
    started: list[Process] = []
    try:
        started.append(start())
        wait_for(lambda: call(started[0].url, "/health")[0] == 200)
        yield started[0]
    finally:
        for process in started + workers:
            process.stop()


def call(
    url: str, path: str, body: Any = None, *, method: str | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and lower-case headers of one request."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url + path, data, names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read(), {k.lower(): v for k, v in error.headers.items()}


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


def free_port() -> int:
    """One that stays free until it is bound."""
    return take_ports("127.0.0.1", 0, 1)[0]


def wait_for(true: Any, seconds: float = 100.0) -> None:
    """Until `true()` is true. The limit is for what never comes true, not for a slow machine."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.05)


def state(url: str) -> dict[str, Any]:
    return json.loads(call(url, "/dashboard/data")[1])


def at_rest(url: str) -> bool:
    """Nothing is under way and nothing is reserved."""
    data = state(url)
    return data["active"] == data["queued"] == 0 and all(
        worker["in_flight"] == 0 and worker["pending_prefill"] == 0 and worker["load"] == 0
        for worker in data["workers"]
    )


def nothing_left(process: Process) -> None:
    """Wait until nothing is reserved, waiting or open but kept connections to living workers."""
    wait_for(lambda: at_rest(process.url))
    wait_for(lambda: metric(process.url, "kvist_client_connections") == 1)  # the one that asks
    assert metric(process.url, "kvist_active_requests") == metric(process.url, "kvist_queued_requests") == 0


def metric(url: str, name: str, **labels: str) -> float:
    """Sum of a metric over its label sets that have `labels`."""
    total = 0.0
    for line in call(url, "/metrics")[1].decode().splitlines():
        if re.match(rf"{name}(\{{|\s)", line) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total
