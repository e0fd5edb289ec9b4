"""Engines and a gateway as child processes on free loopback ports; always stopped again."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from types import TracebackType

START_SECONDS = 60.0
STOP_SECONDS = 10.0


class Child:
    """One kvist process. `port` is read from its first line that names one. Raises RuntimeError."""

    def __init__(self, *arguments: str) -> None:
        self.name = f"kvist {arguments[0]}"
        self.lines: deque[str] = deque(maxlen=50)
        self._port: int | None = None
        self._known = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvist", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's: it ends its children in order
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            found = re.search(r"127\.0\.0\.1:(\d+)|\"port\":(\d+)", line)
            if found and self._port is None:
                self._port = int(found[1] or found[2])
                self._known.set()
        self._known.set()

    @property
    def port(self) -> int:
        """Waits until the process says where it listens."""
        self._known.wait(START_SECONDS)
        if self._port is None:
            raise RuntimeError(f"{self.name} did not start: {' / '.join(self.lines) or 'no output'}")
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Cluster:
    """`workers` engines and a gateway in front, as a context manager. `url` is the gateway's."""

    def __init__(self, router: str, eviction: str, workers: int, speed: float, seed: int) -> None:
        self._children: list[Child] = []
        try:
            engines = [
                self._start(
                    "engine",
                    "--port=0",
                    f"--eviction={eviction}",
                    f"--speed={speed}",
                    f"--seed={seed + i}",
                    "--model=demo",
                )
                for i in range(workers)
            ]
            urls = [engine.url for engine in engines]
            arguments = ["--port=0", f"--policy={router}", f"--seed={seed}", "--worker-urls", *urls]
            self.url = self._start("serve", *arguments).url
        except BaseException:
            self.stop()
            raise

    def _start(self, *arguments: str) -> Child:
        child = Child(*arguments)
        self._children.append(child)
        return child

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """The gateway first, so that it drains into living engines."""
        while self._children:
            self._children.pop().stop()
