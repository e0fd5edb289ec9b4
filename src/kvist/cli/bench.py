"""`kvist bench`: the simulator over a grid of routers, evictions, rates and workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvist.cli.options import Config, Jobs, Json, Out, Seed, listed, numbers

USUAL = ["lbgr,cache_aware,lmetric,kv_score,least_load,random"]


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    workload: Annotated[
        list[str],
        typer.Option(help="gsp, sharegpt, ultrachat, loogle or trace, as name[:FILE][:key=value,…]."),
    ] = ["gsp"],
    routers: Annotated[
        list[str] | None,
        typer.Option(
            help="Routing policies (kvist policies lists them): lbgr, cache_aware, lmetric, kv_score, "
            "least_load, random; for --suite those that are compared."
        ),
    ] = None,
    evictions: Annotated[
        list[str] | None, typer.Option(help="Eviction policies: l-lru,rlt, and all of them for --suite.")
    ] = None,
    rates: Annotated[
        list[str] | None, typer.Option(help="Requests/s; without it each workload's own rate.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers in the cluster.")] = 4,
    profile: Annotated[
        list[str], typer.Option(help="GPU and model: shipped names or .toml paths, dealt round the workers.")
    ] = ["llama-3.1-8b-l40"],
    kv_tokens: Annotated[int | None, typer.Option(min=1, help="KV cache of a worker in tokens.")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block: 1 as SGLang, 16 as vLLM.")] = 1,
    order: Annotated[str, typer.Option(help="Order of the engines' waiting queues.")] = "fcfs",
    kv_events: Annotated[bool, typer.Option(help="The router knows the caches by their events.")] = False,
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token that count as good.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(help="Seconds a further token that count as good.")] = 0.1,
    warmup: Annotated[int, typer.Option(min=0, help="First requests that count in no metric.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell, for confidence intervals.")] = 1,
    bound: Annotated[
        bool, typer.Option(help="Compare the busiest worker's time with a lower bound for any policy.")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="eviction: all policies on all workloads and cache sizes; routing: routers on workloads x "
            "fleets x loads; standard: both."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="--suite in minutes: two cache sizes, blocks of 16; fewer fleets and loads.")
    ] = False,
    traces: Annotated[
        Path, typer.Option(help="Folder of trace files for --suite; those it lacks are left out.")
    ] = Path("../shared/traces"),
    seed: Seed = 0,
    jobs: Jobs = 1,
    executor: Annotated[
        str, typer.Option(help="Where jobs run: processes, or ray (RAY_ADDRESS, else a local cluster).")
    ] = "processes",
    out: Out = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Compare pairs of routing and eviction policies on a simulated cluster."""
    import msgspec
    from rich.console import Console

    from kvist.bench import Cell, stream
    from kvist.cache import EVICTIONS
    from kvist.cli.progress import progress
    from kvist.engine.latency import load_profile
    from kvist.report.bench import write
    from kvist.report.table import bench_tables
    from kvist.routing import ROUTERS
    from kvist.sim import SIMULATOR_ONLY, SimConfig
    from kvist.sim.base import WorkerSpec
    from kvist.spread import EXECUTORS
    from kvist.workloads import make_workload

    listed([executor], "--executor", list(EXECUTORS))
    if suite is not None:
        if suite not in ("eviction", "routing", "standard"):
            raise typer.BadParameter(f"--suite: unknown {suite!r}: choose eviction, routing or standard")
        if executor != "processes":
            raise typer.BadParameter("--executor: the suite runs in processes only")
        if suite != "routing":
            _suite(evictions, traces, 16 if quick else block_size, quick, seeds, seed, jobs, out, as_json)
        if suite != "eviction":
            _routing_suite(routers, traces, quick, seeds, seed, jobs, out, as_json)
        return
    profiles = listed(profile, "--profile")
    for name in profiles:
        load_profile(name)
    fleet = tuple(WorkerSpec(f"w{i}", profile=profiles[i % len(profiles)]) for i in range(workers))
    paces: list[float | None] = [None] if rates is None else [*numbers(rates, "--rates")]
    online = [name for name in EVICTIONS if name != "belady"]
    names = listed(evictions or ["l-lru,rlt"], "--evictions", online)
    cells = []
    for spec in workload:
        make_workload(spec, seed=seed)  # a wrong spec shows before anything runs
        for rate in paces:
            for router in listed(routers or USUAL, "--routers", [*ROUTERS, *SIMULATOR_ONLY]):
                for eviction in names:
                    setup = SimConfig(
                        router=router,
                        eviction=eviction,
                        order=order,
                        fleet=fleet,
                        kv_tokens=kv_tokens,
                        block_size=block_size,
                        kv_events=kv_events,
                        slo_ttft=slo_ttft,
                        slo_tpot=slo_tpot,
                        warmup=warmup,
                        seed=seed,
                    )
                    cells.append(Cell(spec, rate, setup, bound))
    found = {}
    with progress(len(cells) * seeds, "simulating") as advance, _log(out) as log:
        for number, row in stream(cells, seeds, jobs, advance, executor):
            found[number] = row
            log(row.to_dict())
    rows = [found[number] for number in range(len(cells))]
    if out is not None:
        write(rows, out)
    if as_json:
        typer.echo(msgspec.json.encode([row.to_dict() for row in rows]).decode())
        return
    console = Console()
    for table in bench_tables(rows, console.width):
        console.print(table)
    if out is not None:
        console.print(f"report: {out / 'report.html'}")


@contextmanager
def _log(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Each row as it is done, one JSON object a line, so that an interrupted run keeps what it has."""
    import msgspec

    if out is None:
        yield lambda row: None
        return
    with (out / "rows.jsonl").open("wb") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(msgspec.json.encode(row) + b"\n")
            file.flush()

        yield write


def _suite(
    evictions: list[str] | None,
    traces: Path,
    block_size: int,
    quick: bool,
    seeds: int,
    seed: int,
    jobs: int,
    out: Path | None,
    as_json: bool,
) -> None:
    import msgspec
    from rich.console import Console

    from kvist.cache import EVICTIONS
    from kvist.cli.progress import progress
    from kvist.report.suite import suite_table, write
    from kvist.suite import PERCENT, QUICK, run, workloads

    online = [name for name in EVICTIONS if name != "belady"]
    names = online if not evictions else listed(evictions, "--evictions", online)
    specs = workloads(traces)
    with progress(len(specs) * seeds, "replaying") as advance:
        outcome = run(
            specs,
            names,
            percent=QUICK if quick else PERCENT,
            block_size=block_size,
            seeds=seeds,
            seed=seed,
            jobs=jobs,
            progress=advance,
        )
    if out is not None:
        write(outcome, out)
    if as_json:
        typer.echo(msgspec.json.encode(outcome).decode())
        return
    console = Console()
    console.print(suite_table(outcome, console.width))
    if not traces.is_dir():
        console.print(f"generated workloads only: no traces in {traces} (--traces FOLDER)")
    if out is not None:
        console.print(f"report: {out / 'report.html'}")


def _routing_suite(
    routers: list[str] | None,
    traces: Path,
    quick: bool,
    seeds: int,
    seed: int,
    jobs: int,
    out: Path | None,
    as_json: bool,
) -> None:
    import msgspec
    from rich.console import Console

    from kvist.cli.progress import progress
    from kvist.report.routesuite import tables, verdict, write
    from kvist.routesuite import DEFAULT, FLEETS, LOADS, QUICK, points, run
    from kvist.routing import ROUTERS
    from kvist.sim import SIMULATOR_ONLY

    names = listed(routers, "--routers", [*ROUTERS, *SIMULATOR_ONLY]) if routers else list(DEFAULT)
    found = points(traces if traces.is_dir() else None, QUICK if quick else LOADS)
    if quick:
        found = [point for point in found if point.fleet in FLEETS[:2]]
    with progress(len(found) * len(names) * seeds, "simulating") as advance:
        outcome = run(found, names, seeds=seeds, seed=seed, jobs=jobs, progress=advance)
    if out is not None:
        write(outcome, out)
    if as_json:
        typer.echo(msgspec.json.encode(outcome).decode())
        return
    console = Console()
    for table in tables(outcome, console.width):
        console.print(table)
    for line in verdict(outcome):
        console.print(line, highlight=False)
    if out is not None:
        console.print(f"report: {out / 'routing.html'}")
