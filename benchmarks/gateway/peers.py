"""The proxies under test and how to get and start them. Each peer lives in a venv of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gateway.processes import Child, answers, free_port

CACHE = Path(__file__).resolve().parents[2] / ".cache"


@dataclass(frozen=True, slots=True)
class Proxy:
    """`command` makes the command line from its program, its port and the workers' URLs."""

    name: str
    package: str  # on PyPI; "" for kvist itself
    command: Callable[[str, int, list[str]], list[str]]

    def program(self, given: str = "") -> str:
        """Path of the executable, installed first where needed. Raises RuntimeError saying what is wrong."""
        if not self.package:
            return sys.executable
        script = Path(given) if given else CACHE / self.package / "bin" / self.package
        if script.exists():
            return str(script)
        if given:
            raise RuntimeError(f"{self.name}: {given} does not exist")
        print(f"installing {self.package} into {script.parent.parent}", file=sys.stderr)
        steps = (
            [sys.executable, "-m", "venv", str(script.parent.parent)],
            [str(script.parent / "python"), "-m", "pip", "install", "--quiet", self.package],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                words = (done.stderr or done.stdout).strip().splitlines()[-1:]
                raise RuntimeError(f"{self.name}: `{' '.join(step[-3:])}` failed: {' '.join(words)}")
        if not script.exists():
            raise RuntimeError(f"{self.name}: {self.package} brought no program {script}")
        return str(script)

    def start(self, program: str, workers: list[str], options: Sequence[str] = ()) -> tuple[Child, str]:
        """The process and its URL, once it answers. Raises RuntimeError."""
        port = free_port()
        child = Child(self.name, [*self.command(program, port, workers), *options])
        url = f"http://127.0.0.1:{port}"
        try:
            child.wait(lambda: answers(url))
        except BaseException:
            child.stop()
            raise
        return child, url


def _kvist(policy: str) -> Callable[[str, int, list[str]], list[str]]:
    def command(python: str, port: int, workers: list[str]) -> list[str]:
        return [
            python,
            "-m",
            "kvist",
            "serve",
            f"--port={port}",
            f"--policy={policy}",
            "--worker-urls",
            *workers,
        ]

    return command


def _smg(script: str, port: int, workers: list[str]) -> list[str]:
    return [
        *(script, "launch", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        *("--policy", "cache_aware", "--prometheus-port", str(free_port()), "--worker-urls", *workers),
    ]


def _vllm_router(script: str, port: int, workers: list[str]) -> list[str]:
    return [
        *(script, "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"),
        *("--policy", "cache_aware", "--prometheus-port", str(free_port()), "--worker-urls", *workers),
    ]


PROXIES = {
    "kvist": Proxy("kvist lbgr", "", _kvist("lbgr")),
    "smg": Proxy("smg cache_aware", "smg", _smg),
    "vllm-router": Proxy("vllm-router cache_aware", "vllm-router", _vllm_router),
}
