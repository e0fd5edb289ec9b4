"""The dashboard in a real browser, in front of a live gateway; skipped where no Chromium is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = resources.files("kvist.gateway").joinpath("dashboard/index.html").read_text()


def test_the_page_needs_nothing_from_outside() -> None:
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://(?!\))""", PAGE.replace("https?:", ""))


@pytest.fixture
def gateway() -> Iterator[str]:
    """A gateway in front of one fake worker, after a few requests."""
    worker = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_worker.py")), "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    url = f"http://127.0.0.1:{int(worker.stdout.readline())}"
    serve = subprocess.Popen(
        [sys.executable, "-m", "kvist", "serve", "--port=0", "--worker-urls", url],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert serve.stderr is not None
    try:
        base = f"http://127.0.0.1:{json.loads(serve.stderr.readline())['port']}"
        for i in range(5):
            body = json.dumps({"messages": [{"role": "user", "content": f"<b>question</b> {i}"}]}).encode()
            urllib.request.urlopen(f"{base}/v1/chat/completions", body).read()
        yield base
    finally:
        for process in (serve, worker):
            process.terminate()
            process.wait(10)


def test_the_page_shows_workers_and_decisions(gateway: str, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: install the package chromium to run this")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=4000",
        "--dump-dom",
        f"{gateway}/dashboard",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert ">live<" in dom and ">lbgr<" in dom
    assert '<td class="good">ready</td>' in dom
    assert len(re.findall(r'<details data-id="\d+"', dom)) == 5 and "smallest predicted latency" in dom
    assert dom.count("<path") >= 4, "every chart has a line"
    data = json.loads(urllib.request.urlopen(f"{gateway}/dashboard/data").read())
    assert data["workers"][0]["requests"] == 5 and len(data["recent"]) == 5
    assert data["workers"][0]["in_flight"] == 0
