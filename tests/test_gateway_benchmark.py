"""The gateway's benchmark runs, with its own load generator, and says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gateway", "--load=own", "--rounds=1", "--seconds=1"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_it_measures_kvist_and_leaves_out_a_peer_that_is_missing() -> None:
    done = run("--peers", "kvist", "smg", "--smg=/nowhere", "--connections=4", "--prompts=short", "--json")
    assert done.returncode == 0 and "left out: smg cache_aware: /nowhere does not exist" in done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["proxy"], row["stream"]) for row in rows] == [
        ("direct", False),
        ("kvist", False),
        ("direct", True),
        ("kvist", True),
    ]
    for row in rows:
        assert row["errors"] == 0 and row["rate"] > 10 and 0 < row["p50"] <= row["p99"]
    assert rows[1]["rss_bytes"] > 10 << 20 and rows[1]["added_p50"] > 0


def test_without_any_proxy_it_says_so() -> None:
    done = run("--peers", "smg", "--smg=/nowhere")
    assert done.returncode == 1 and "no proxy could be started" in done.stderr
