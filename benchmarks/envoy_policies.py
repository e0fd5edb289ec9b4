"""What the picker is worth behind Envoy: the paper's shared-prefix workload over embedded engines.

    python -m benchmarks.envoy_policies [--speed 4] [--prompts 8]

The same engines (models of an engine, RLT eviction), requests and arrival times three times: Envoy alone by
round robin, Envoy with kvist picker, and the plain gateway, both with LBGR. Hit rates are the engines' own
counts; times are the client's, in modelled seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvist.demo.envoy import Envoy, LocalPool
from kvist.demo.processes import Child, Cluster
from kvist.demo.run import Scale
from kvist.demo.traffic import drive, jobs
from kvist.picker.envoy import bootstrap


@contextmanager
def envoy_alone(engine: list[str], workers: int) -> Iterator[str]:
    children = [Child("engine", "--port=0", f"--seed={number}", *engine) for number in range(workers)]
    envoy = None
    try:
        places = [f"127.0.0.1:{child.port}" for child in children]
        envoy = Envoy(bootstrap(places, port=0, picker=None))
        yield envoy.url
    finally:
        if envoy is not None:
            envoy.stop()
        for child in children:
            child.stop()


@contextmanager
def with_picker(engine: list[str], workers: int) -> Iterator[str]:
    with LocalPool(workers, engine=engine, picker=["--drain-notice=0"]) as pool:
        yield pool.url


@contextmanager
def gateway(scale: Scale) -> Iterator[str]:
    with Cluster("lbgr", "rlt", scale.workers, scale.speed, scale.seed) as cluster:
        yield cluster.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speed", type=float, default=4, help="modelled seconds a second")
    parser.add_argument("--prompts", type=int, default=8, help="of each of the 128 groups")
    args = parser.parse_args()
    scale = Scale(prompts=args.prompts, speed=args.speed)
    engine = ["--eviction=rlt", f"--speed={scale.speed}", "--model=demo"]
    work = jobs(scale.workload(), scale.speed)
    print(f"{scale.describe()}; load average {os.getloadavg()[0]:.1f}")
    print(f"{'':28}{'answered':>9}{'failed':>8}{'hit rate':>10}{'TTFT mean':>11}{'p50':>8}{'p99':>8}")
    for name, setup in (
        ("Envoy alone, round robin", envoy_alone(engine, scale.workers)),
        ("Envoy + picker, LBGR", with_picker(engine, scale.workers)),
        ("kvist serve, LBGR", gateway(scale)),
    ):
        with setup as url:
            sent, failed, _ = drive(url, work, lambda: None)
        times = np.array([result.ttft for result in sent]) * scale.speed
        hits = sum(r.cached_tokens for r in sent) / max(sum(r.prompt_tokens for r in sent), 1)
        p50, p99 = np.percentile(times, [50, 99])
        print(
            f"{name:28}{len(sent):9}{failed:8}{hits:10.1%}{times.mean():11.2f}{p50:8.2f}{p99:8.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
