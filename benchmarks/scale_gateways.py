"""Several gateways in front of the same simulated workers: alone, with KV events, with shared load.

    python benchmarks/scale_gateways.py [--gateways 1 2 4] [--intervals 0.1 1] [--seeds 3] [--router lbgr]

The paper's shared-prefix workload (128 groups of 24 prompts, 512 to 8 192 tokens) at 3 requests/s a worker
over 8 workers, whose KV caches hold 120 000 tokens. `clients`: each request goes to a gateway at random, or
each group keeps to one (sticky). `events`: every gateway knows the caches from the workers' KV events;
without, each knows what it sent where. `interval`: seconds between exchanges of load, `-` for none. Means
over seeds; times in milliseconds.
"""

from __future__ import annotations

import argparse
from statistics import mean

from kvist.gateway.sharing.simulate import Gateways, simulate
from kvist.sim import SimConfig
from kvist.workloads import make_workload


def row(gateways: Gateways, events: bool, router: str, seeds: int) -> str:
    runs = []
    for seed in range(1, seeds + 1):
        config = SimConfig(
            router=router, workers=8, kv_tokens=120_000, block_size=16, kv_events=events, seed=seed
        )
        workload = make_workload("gsp:groups=128,prompts=24", rate=24.0, seed=seed)
        runs.append(simulate(workload, config, gateways))
    interval = "-" if gateways.interval is None else gateways.interval
    return (
        f"{gateways.count:>8} {'sticky' if gateways.sticky else 'random':<8}{'yes' if events else 'no':<7}"
        f"{interval:>8}{mean(r.hit_rate for r in runs):>8.1%}{mean(r.ttft.mean for r in runs) * 1e3:>8.0f}"
        f"{mean(r.ttft.p99 for r in runs) * 1e3:>8.0f}{mean(r.latency.mean for r in runs) * 1e3:>9.0f}"
        f"{mean(r.imbalance for r in runs):>10.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--intervals", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--router", default="lbgr")
    args = parser.parse_args()
    print(
        f"{'gateways':>8} {'clients':<8}{'events':<7}{'interval':>8}{'hits':>8}{'TTFT':>8}{'p99':>8}"
        f"{'latency':>9}{'imbalance':>10}",
        flush=True,
    )
    for events in (False, True):
        for count in args.gateways:
            for sticky in (False, True) if count > 1 else (False,):
                for interval in (None, *args.intervals) if count > 1 else (None,):
                    print(row(Gateways(count, interval, sticky), events, args.router, args.seeds), flush=True)


if __name__ == "__main__":
    main()
