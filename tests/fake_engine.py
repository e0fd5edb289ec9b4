"""Stands in for `vllm serve` in tests of the launcher: its options, a helper process, an embedded engine.

FAKE_ENGINE says how it behaves: "usage" ends with exit code 2, "stubborn" ignores SIGTERM, else it serves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["serve"])
parser.add_argument("model")
parser.add_argument("--host", required=True)
parser.add_argument("--port", required=True)
parser.add_argument("--kv-events-config", type=json.loads, required=True)
parser.add_argument("--enable-prompt-tokens-details", action="store_true")
parser.add_argument("--block-size", default="16")
given = parser.parse_args()

mode = os.environ.get("FAKE_ENGINE", "")
if mode == "usage":
    sys.exit(2)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(f"helper {helper.pid}, eviction {os.environ.get('KVIST_EVICTION', 'own')}", flush=True)
if mode == "stubborn":
    while True:
        time.sleep(1)
events = given.kv_events_config
words = ["engine", "--host", given.host, "--port", given.port, "--model", given.model, "--speed", "20"]
words += ["--kv-events", events["endpoint"], "--kv-events-replay", events["replay_endpoint"]]
words += ["--kv-events-topic", events["topic"], "--block-size", given.block_size, "--kv-tokens", "4096"]
os.execv(sys.executable, [sys.executable, "-m", "kvist", *words])
