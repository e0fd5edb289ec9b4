"""kvist with LBGR beside smg and vllm-router: requests/s, added latency, memory, under the same load.

    python -m benchmarks.gateway [--quick] [--json] [--peers kvist smg vllm-router] [--smg PATH]

Four minimal workers, the proxies and the load generator share `--cores` cores. The peers come from PyPI, each
into a venv under .cache/. In every round each scenario is put to the workers directly and to each proxy in
turn, so that a busy spell of the machine meets all of them; medians over the rounds are printed, and a ratio
is the median of the rounds' ratios. `added` is the latency above that of a worker asked directly, `CPU us`
what the proxy itself used a request, which a busy machine disturbs least.

wrk corrects its percentiles for coordinated omission: at one connection, p99 weighs stalls by their length.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import count, product
from statistics import median

from benchmarks.gateway.load import Result, drive, generator
from benchmarks.gateway.peers import PROXIES
from benchmarks.gateway.processes import Child, pin, start_workers

DIRECT = "direct"
PROMPTS = {"short": 2048, "4k-token": 16384}  # bytes; four bytes are about a token


@dataclass(frozen=True, slots=True)
class Scenario:
    prompt: str
    stream: bool
    connections: int

    def __str__(self) -> str:
        kind = "stream" if self.stream else "whole"
        return f"{self.prompt} prompts, {kind} answers, {self.connections} connections"


@dataclass(slots=True)
class Series:
    """The rounds of one proxy in one scenario."""

    results: list[Result] = field(default_factory=list)

    def middle(self, name: str) -> float:
        return float(median(getattr(result, name) for result in self.results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 s, short streams left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompts", choices=PROMPTS, nargs="+", default=list(PROMPTS))
    parser.add_argument("--answers", choices=["whole", "stream"], nargs="+", default=["whole", "stream"])
    parser.add_argument("--peers", choices=PROXIES, nargs="+", default=list(PROXIES))
    parser.add_argument("--smg", default="", metavar="PATH", help="an installed smg")
    parser.add_argument("--vllm-router", default="", metavar="PATH", help="an installed vllm-router")
    parser.add_argument("--load", choices=["auto", "wrk", "own"], default="auto", help="the load generator")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 2), min(args.seconds, 2)
    try:
        tool = generator(args.load)
    except ValueError as error:
        parser.error(str(error))
    cores = pin(args.cores)
    scenarios = [
        Scenario(prompt, answer == "stream", connections)
        for prompt, answer, connections in product(args.prompts, args.answers, args.connections)
    ]
    if args.quick:
        scenarios = [s for s in scenarios if not (s.stream and s.prompt == "short")] or scenarios
    setting = (
        f"{tool}, {args.workers} workers, {cores} cores, {args.rounds} rounds of {args.seconds:g} s, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )
    given = {"smg": args.smg, "vllm-router": args.vllm_router}
    with ExitStack() as stack:
        workers, urls = start_workers(args.workers)
        stack.callback(workers.stop)
        running: dict[str, tuple[Child, str]] = {}
        for name in args.peers:
            try:
                running[name] = PROXIES[name].start(PROXIES[name].program(given.get(name, "")), urls)
            except RuntimeError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            stack.callback(running[name][0].stop)
        if not running:
            print("no proxy could be started", file=sys.stderr)
            return 1
        table = measure(scenarios, {DIRECT: (workers, urls[0]), **running}, tool, args)
        memory = {name: child.rss() for name, (child, _) in running.items()}
    if args.json:
        print(json.dumps(as_json(setting, table, memory)))
    else:
        show(setting, table, memory)
    return 0


def measure(
    scenarios: list[Scenario], running: dict[str, tuple[Child, str]], tool: str, args: argparse.Namespace
) -> dict[Scenario, dict[str, Series]]:
    numbers = count(os.getpid() % 10_000 * 1000)
    targets = list(running.items())
    for scenario, (_, (_, url)) in product({(s.prompt, s.stream): s for s in scenarios}.values(), targets):
        drive(tool, url, 16, 1, PROMPTS[scenario.prompt], scenario.stream, next(numbers))  # warm
    table = {scenario: {name: Series() for name, _ in targets} for scenario in scenarios}
    for turn in range(args.rounds):
        for scenario in scenarios:
            at = turn % len(targets)
            for name, (child, url) in targets[at:] + targets[:at]:
                size, before = PROMPTS[scenario.prompt], child.cpu()
                found = drive(
                    tool, url, scenario.connections, args.seconds, size, scenario.stream, next(numbers)
                )
                found = replace(found, cpu=child.cpu() - before)
                table[scenario][name].results.append(found)
                if sys.stderr.isatty():
                    print(f"\r\033[Kround {turn + 1}: {scenario}, {name}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return table


def ratio(own: Series, other: Series, name: str) -> float:
    """Median over the rounds of own / other."""
    pairs = zip(own.results, other.results, strict=True)
    return float(median(getattr(a, name) / (getattr(b, name) or float("inf")) for a, b in pairs))


def show(setting: str, table: dict[Scenario, dict[str, Series]], memory: dict[str, int]) -> None:
    print(setting)
    for scenario, rows in table.items():
        print(f"\n{scenario}")
        print(
            f"  {'':24}{'requests/s':>11}{'p50 ms':>9}{'p99 ms':>9}{'added p50':>11}{'added p99':>11}", end=""
        )
        print(f"{'CPU us':>8}{'errors':>8}", "  kvist / this: requests/s, p50, p99, CPU" * ("kvist" in rows))
        for name, series in rows.items():
            title = PROXIES[name].name if name in PROXIES else "worker, directly"
            p50, p99 = series.middle("p50") * 1e3, series.middle("p99") * 1e3
            line = f"  {title:24}{series.middle('rate'):11,.0f}{p50:9.2f}{p99:9.2f}"
            if name == DIRECT:
                line += f"{'':22}"
            else:
                direct = rows[DIRECT]
                added = (p50 - direct.middle("p50") * 1e3, p99 - direct.middle("p99") * 1e3)
                line += f"{added[0]:11.2f}{added[1]:11.2f}"
            line += (
                f"{series.middle('cpu_each') * 1e6:8.0f}{sum(result.errors for result in series.results):8}"
            )
            if name not in (DIRECT, "kvist") and "kvist" in rows:
                ratios = [ratio(rows["kvist"], series, field) for field in ("rate", "p50", "p99", "cpu_each")]
                line += "   " + ", ".join(f"{value:.2f}" for value in ratios)
            print(line)
    sizes = ", ".join(f"{PROXIES[name].name} {size / 2**20:.0f} MiB" for name, size in memory.items())
    print(f"\nresident memory afterwards: {sizes}")


def as_json(
    setting: str, table: dict[Scenario, dict[str, Series]], memory: dict[str, int]
) -> dict[str, object]:
    found = []
    for scenario, rows in table.items():
        for name, series in rows.items():
            row: dict[str, object] = {**asdict(scenario), "proxy": name}
            row |= {key: series.middle(key) for key in ("rate", "p50", "p90", "p99", "cpu_each")}
            row["errors"] = sum(result.errors for result in series.results)
            row["rounds"] = [asdict(result) for result in series.results]
            if name != DIRECT:
                direct = rows[DIRECT]
                row |= {f"added_{key}": series.middle(key) - direct.middle(key) for key in ("p50", "p99")}
                row["rss_bytes"] = memory[name]
            if "smg" in rows and name not in (DIRECT, "smg"):
                row["ratio_to_smg"] = {key: ratio(series, rows["smg"], key) for key in ("rate", "p50", "p99")}
            found.append(row)
    return {"setting": setting, "rows": found}


if __name__ == "__main__":
    sys.exit(main())
