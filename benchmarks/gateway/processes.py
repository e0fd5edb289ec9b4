"""Child processes of the benchmark: started on loopback, pinned to the benchmark's cores, always stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile

HERE = Path(__file__).resolve().parent
START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Child:
    """A process; its output is kept for the message if it fails."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._out = TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=subprocess.STDOUT
        )

    def output(self) -> str:
        self._out.seek(0)
        return self._out.read()[-2000:].decode(errors="replace")

    def wait(self, ready: Callable[[], bool]) -> None:
        """Raises RuntimeError with the process's own words if it ends or takes too long."""
        end = time.monotonic() + START_SECONDS
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.name} did not start:\n{self.output()}")
            time.sleep(0.1)

    def rss(self) -> int:
        """Resident bytes of the process and its children."""
        return _rss(self.process.pid)

    def cpu(self) -> float:
        """CPU seconds used so far, user and kernel."""
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._out.close()


def _rss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")), 0)
    return own * 1024 + sum(_rss(int(child)) for child in children)


def answers(url: str) -> bool:
    """Whether a chat request is answered 200."""
    body = b'{"model":"fake","messages":[{"role":"user","content":"ready?"}]}'
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body, {"content-type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def start_workers(count: int, *options: str) -> tuple[Child, list[str]]:
    """`count` workers in one process and their URLs."""
    child = Child("workers", [sys.executable, str(HERE / "worker.py"), str(count), *options])
    try:
        child.wait(lambda: len(child.output().split()) >= count)
    except BaseException:
        child.stop()
        raise
    return child, [f"http://127.0.0.1:{port}" for port in child.output().split()[:count]]


def pin(cores: int) -> int:
    """Keep this process and its children on so many cores; how many there are in the end."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        os.sched_setaffinity(0, allowed)
        return len(allowed)
    return os.cpu_count() or 1
