"""`kvist demo`: its figures, its page, and that nothing it started outlives it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, NONE_HERE, Browser
from gateway_processes import SECONDS, wait_for

from kvist.demo.processes import Cluster
from kvist.demo.run import Setup, caution, verdict
from kvist.report.demo import demo_table

SMALL = ("--prompts=1", "--speed=40", "--workers=2", "--traces=nowhere")


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "kvist", "demo", *SMALL, *options]


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def alive(pid: int) -> bool:
    """A process that ended but was not waited for yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with report.html and result.json of one run."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        command("--json", f"--out={folder}"), capture_output=True, text=True, timeout=280, check=True
    )
    (folder / "result.json").write_text(done.stdout)
    return folder


def test_both_set_ups_serve_the_same_traffic(out: Path) -> None:
    data = json.loads((out / "result.json").read_text())
    usual, ours = data["setups"]
    assert (usual["router"], usual["eviction"]) == ("cache_aware", "l-lru")
    assert (ours["router"], ours["eviction"]) == ("lbgr", "hedge")
    for setup in (usual, ours):
        assert setup["requests"] == 128 and setup["failed"] == 0
        assert 0 <= setup["hit_rate"] < 0.6, "half of each prompt can be shared"
        assert 0 < setup["ttft_p50"] <= setup["ttft_p95"] <= setup["ttft_p99"] <= setup["latency_p99"]
        assert setup["ttft_mean"] < setup["latency_mean"] and setup["throughput"] > 0
    assert "compared to cache_aware + l-lru" in data["verdict"]


def test_the_page_stands_alone(out: Path) -> None:
    html = (out / "report.html").read_text()
    assert not re.findall(r"""<script|(?:src|href)\s*=\s*["'](?!#|data:)|@import""", html)
    assert "usual: cache_aware + l-lru" in html and html.count("<figure>") == 2


@pytest.mark.skipif(CHROMIUM is None, reason=NONE_HERE)
def test_the_page_fits_a_phone(out: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        for width, dark in ((390, False), (390, True), (1280, True)):
            browser.show(width, 800, dark=dark, phone=width < 500)
            browser.open((out / "report.html").as_uri())
            browser.wait("document.readyState === 'complete' && document.querySelector('table') !== null")
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("document.querySelector('table').offsetWidth") <= width, "no column is cut off"
        assert not browser.errors and {url[:5] for url in browser.requested} <= {"file:", "data:"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_what_it_started(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(f"--out={tmp_path}", "--speed=2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        wait_for(lambda: len(children(process.pid)) == 3)  # two engines and the gateway
        time.sleep(1)
        started = children(process.pid)
        process.send_signal(number)
        assert process.wait(SECONDS) in (130, 128 + number)
        assert not [pid for pid in started if alive(pid)]
        assert process.stdout is not None and b"Traceback" not in process.stdout.read()
    finally:
        process.kill()
        process.wait()


def test_a_set_up_that_cannot_start_leaves_nothing_and_says_why() -> None:
    before = children(os.getpid())
    with pytest.raises(RuntimeError, match=r"kvist serve did not start: .*unknown"):
        Cluster("no-such-router", "rlt", 2, 10.0, 0)
    assert not [pid for pid in children(os.getpid()) - before if alive(pid)]


def setup(**changed: float) -> Setup:
    figures = dict.fromkeys(Setup.__slots__, 1.0) | {"requests": 10, "failed": 0, "late_p99": 0.0} | changed
    return Setup(**{**figures, "router": "a", "eviction": "b"})  # type: ignore[arg-type]


def test_the_verdict_says_which_way_it_went() -> None:
    better = verdict(setup(), setup(ttft_mean=0.5, hit_rate=1.1))
    assert "50 % less time to the first token" in better and "10.0 points more" in better
    assert "100 % MORE time to the first token" in verdict(setup(), setup(ttft_mean=2.0))
    assert not caution([setup(), setup()], 10.0)
    assert "1.0 modelled seconds" in caution([setup(), setup(late_p99=0.1)], 10.0)
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo_table(setup(), setup(ttft_mean=0.5, failed=3)))
    text = console.export_text()
    assert re.search(r"First token after, mean\s*│\s*1\.00 s\s*│\s*0\.50 s\s*│\s*-50 %", text)
    assert re.search(r"Not answered\s*│\s*0\s*│\s*3\s*│\s*\+3", text)
