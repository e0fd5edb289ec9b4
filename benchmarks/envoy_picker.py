"""Envoy with the kvist picker beside the plain kvist gateway and Envoy alone, under the same load.

    python -m benchmarks.envoy_picker [--rounds 5] [--seconds 4] [--json]

Four minimal workers, the proxies and the load generator (that of `benchmarks.gateway`) share `--cores` cores.
In every round each scenario is put to all of them in turn, so that a busy spell of the machine meets all;
medians over the rounds are printed. `CPU us` is what a request cost Envoy (or the gateway) and the picker.

    direct      a worker, asked directly
    gateway     kvist serve, LBGR
    envoy       Envoy alone, round robin
    picker      Envoy, and kvist picker with LBGR behind its external-processing filter, full duplex
    picker-head the same, but Envoy does not show the picker the answers' bodies
    grpcio      the same decisions as `picker`, carried by grpc.aio instead of kvist's own gRPC server
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.gateway.load import Result, drive, generator
from benchmarks.gateway.peers import PROXIES
from benchmarks.gateway.processes import Child, answers, free_port, pin, start_workers
from kvist.demo.envoy import Envoy
from kvist.picker.envoy import bootstrap

ROWS = ("direct", "gateway", "envoy", "picker", "picker-head", "grpcio")
PROMPTS = {"short": 2048, "4k-token": 16384}  # bytes


@dataclass(slots=True)
class Target:
    """A URL under test, and the processes whose CPU time counts: the proxy's, and the picker's."""

    url: str
    proxy: int
    picker: int | None = None
    results: dict[tuple[str, bool, int], list[tuple[Result, float, float]]] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompts", choices=PROMPTS, nargs="+", default=["short"])
    parser.add_argument("--answers", choices=["whole", "stream"], nargs="+", default=["whole", "stream"])
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--load", choices=["auto", "wrk", "own"], default="auto")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-grpcio", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_grpcio:
        asyncio.run(serve_grpcio(int(args.serve_grpcio[0]), args.serve_grpcio[1:]))
        return 0
    tool, cores = generator(args.load), pin(args.cores)
    setting = (
        f"{tool}, {args.workers} workers, {cores} cores, {args.rounds} rounds of {args.seconds:g} s, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )
    scenarios = list(
        itertools.product(args.prompts, [answer == "stream" for answer in args.answers], args.connections)
    )
    with ExitStack() as stack:
        targets = start(args.rows, args.workers, stack)
        measure(targets, scenarios, tool, args)
    if args.json:
        print(json.dumps(as_json(setting, targets)))
    else:
        show(setting, targets, scenarios)
    return 0


def start(rows: list[str], count: int, stack: ExitStack) -> dict[str, Target]:
    workers, urls = start_workers(count)
    stack.callback(workers.stop)
    places = [url.removeprefix("http://") for url in urls]
    found = {}
    for row in rows:
        if row == "direct":
            found[row] = Target(urls[0], workers.process.pid)
        elif row == "gateway":
            child, url = PROXIES["kvist"].start(sys.executable, urls)
            stack.callback(child.stop)
            found[row] = Target(url, child.process.pid)
        else:
            picker = None
            if row != "envoy":
                picker, port = start_picker(row, places)
                stack.callback(picker.stop)
            config = bootstrap(
                places,
                port=0,
                picker=f"127.0.0.1:{port}" if picker is not None else None,
                observe_body=row != "picker-head",
                health_seconds=10,
            )
            envoy = Envoy(config, threads=1)
            stack.callback(envoy.stop)
            end = time.monotonic() + 30
            while not answers(envoy.url):
                if time.monotonic() > end:
                    raise RuntimeError(f"{row} does not answer")
                time.sleep(0.1)
            found[row] = Target(envoy.url, envoy.process.pid, picker.process.pid if picker else None)
    return found


def start_picker(row: str, places: list[str]) -> tuple[Child, int]:
    port = free_port()
    if row == "grpcio":
        command = [sys.executable, "-m", "benchmarks.envoy_picker", "--serve-grpcio", str(port), *places]
    else:
        command = [sys.executable, "-m", "kvist", "picker", f"--grpc-port={port}", "--grpc-health-port=0"]
        command += ["--metrics-port=0", "--endpoints", *places]
    child = Child(row, command)
    child.wait(lambda: f"{port}" in child.output())
    return child, port


def cpu(pid: int | None) -> float:
    """CPU seconds of a process so far."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat") as file:
        ticks = file.read().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def measure(
    targets: dict[str, Target], scenarios: list[tuple[str, bool, int]], tool: str, args: argparse.Namespace
) -> None:
    numbers = itertools.count(os.getpid() % 10_000 * 1000)
    for target in targets.values():
        drive(tool, target.url, 16, 1, PROMPTS[scenarios[0][0]], False, next(numbers))  # warm
    order = list(targets.values())
    for turn in range(args.rounds):
        for prompt, stream, connections in scenarios:
            at = turn % len(order)
            for target in order[at:] + order[:at]:
                before = cpu(target.proxy), cpu(target.picker)
                result = drive(
                    tool, target.url, connections, args.seconds, PROMPTS[prompt], stream, next(numbers)
                )
                spent = cpu(target.proxy) - before[0], cpu(target.picker) - before[1]
                key = prompt, stream, connections
                target.results.setdefault(key, []).append((result, *spent))


def figures(rows: list[tuple[Result, float, float]]) -> dict[str, float]:
    """Medians over the rounds; times in seconds."""
    return {
        "rate": median(result.rate for result, _, _ in rows),
        "p50": median(result.p50 for result, _, _ in rows),
        "p99": median(result.p99 for result, _, _ in rows),
        "proxy_cpu": median(spent / max(result.requests, 1) for result, spent, _ in rows),
        "picker_cpu": median(spent / max(result.requests, 1) for result, _, spent in rows),
        "errors": sum(result.errors for result, _, _ in rows),
    }


def show(setting: str, targets: dict[str, Target], scenarios: list[tuple[str, bool, int]]) -> None:
    print(setting)
    for key in scenarios:
        prompt, stream, connections = key
        kind = "streamed" if stream else "whole"
        print(f"\n{prompt} prompts, {kind} answers, connections: {connections}")
        columns = ("requests/s", "p50 ms", "p99 ms", "CPU us: proxy", "picker", "errors")
        print(f"  {'':12}" + "".join(f"{column:>15}" for column in columns))
        for name, target in targets.items():
            found = figures(target.results[key])
            print(
                f"  {name:12}{found['rate']:15,.0f}{found['p50'] * 1e3:15.2f}{found['p99'] * 1e3:15.2f}"
                f"{found['proxy_cpu'] * 1e6:15.0f}{found['picker_cpu'] * 1e6:15.0f}{found['errors']:15.0f}"
            )
        if {"gateway", "picker"} <= set(targets):
            gateway, picker = targets["gateway"].results[key], targets["picker"].results[key]
            pairs = list(zip(picker, gateway, strict=True))
            ratios = [median(a[0].rate / b[0].rate for a, b in pairs)]
            ratios += [median(getattr(a[0], q) / getattr(b[0], q) for a, b in pairs) for q in ("p50", "p99")]
            print("  picker / gateway: requests/s {:.2f}, p50 {:.2f}, p99 {:.2f}".format(*ratios))


def as_json(setting: str, targets: dict[str, Target]) -> dict[str, Any]:
    rows = []
    for name, target in targets.items():
        for (prompt, stream, connections), found in target.results.items():
            row: dict[str, Any] = {
                "row": name,
                "prompt": prompt,
                "stream": stream,
                "connections": connections,
            }
            rows.append({**row, **figures(found), "rounds": [asdict(result) for result, _, _ in found]})
    return {"setting": setting, "rows": rows}


async def serve_grpcio(port: int, places: list[str]) -> None:
    """The picker's exchanges, carried by grpc.aio."""
    import grpc
    from grpc import aio

    from kvist.picker.core import Picker
    from kvist.picker.endpoints import EndpointFleet
    from kvist.picker.exchange import Exchange
    from kvist.picker.protocol import SERVICE
    from kvist.picker.settings import build

    settings = build({"endpoints": places}, "benchmark")
    fleet = EndpointFleet(settings, lambda event, **fields: None)
    fleet.replace(dict.fromkeys(places, True), time.monotonic())
    picker = Picker(settings, fleet, time.monotonic)

    async def process(messages: Any, context: Any) -> None:
        exchange = Exchange(picker)
        try:
            while (data := await context.read()) is not aio.EOF:
                for message in exchange.receive(data, time.monotonic()):
                    await context.write(message)
        finally:
            exchange.close(time.monotonic())

    async def check(data: bytes, context: Any) -> bytes:
        return b"\x08\x01"  # SERVING

    server = aio.server()
    for service, method, handler in (
        (SERVICE, "Process", grpc.stream_stream_rpc_method_handler(process)),
        ("grpc.health.v1.Health", "Check", grpc.unary_unary_rpc_method_handler(check)),
    ):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    sys.exit(main())
