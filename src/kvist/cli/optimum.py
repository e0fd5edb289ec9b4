"""`kvist optimum`: routing policies against the exact optimum of the unified model, on a small instance."""

from __future__ import annotations

from typing import Annotated

import typer

from kvist.cli.options import Config, Json, Seed, listed


def register(app: typer.Typer) -> None:
    app.command()(optimum)


def optimum(
    workload: Annotated[str, typer.Option(help="As in kvist bench.")] = "gsp:groups=4,prompts=4",
    queries: Annotated[int, typer.Option(min=1, help="First so many queries of it.")] = 12,
    workers: Annotated[int, typer.Option(min=1)] = 3,
    routers: Annotated[list[str], typer.Option(help="Routing policies.")] = [
        "lbgr,cache_aware,lmetric,kv_score,least_load,round_robin,random"
    ],
    miss: Annotated[float, typer.Option(min=0, help="Milliseconds an uncached token.")] = 0.15,
    cached: Annotated[float, typer.Option(min=0, help="Milliseconds a cached token.")] = 0.005,
    output: Annotated[float, typer.Option(min=0, help="Milliseconds an output token.")] = 20.0,
    seed: Seed = 0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Print each routing policy's makespan, its gap to the exact optimum, and the lower bound."""
    from itertools import islice
    from random import Random

    import msgspec
    from rich.console import Console
    from rich.table import Table

    from kvist.model import Cost, makespan
    from kvist.optimum import Instance, assign, lower_bound
    from kvist.optimum import optimum as solve
    from kvist.routing import ROUTERS, make_policy
    from kvist.workloads import make_workload

    stream = islice(make_workload(workload, seed=seed), queries)
    costs = [Cost(cached / 1000, miss / 1000, output / 1000)] * workers
    instance = Instance(list(stream), costs)
    best, _ = solve(instance)
    bound = lower_bound(instance)
    found = {
        name: makespan(instance.loads(assign(instance, make_policy(name, rng=Random(f"{seed}/{name}")))))
        for name in listed(routers, "--routers", list(ROUTERS))
    }
    if as_json:
        typer.echo(msgspec.json.encode({"optimum": best, "lower_bound": bound, "makespans": found}).decode())
        return
    table = Table(
        title=f"Makespan of {len(instance.queries)} queries on {workers} workers, caches that never evict"
    )
    for text in ("policy", "makespan s", "over optimum"):
        table.add_column(text, justify="left" if text == "policy" else "right")
    table.add_row("lower bound", f"{bound:.3f}", f"{bound / best - 1:+.1%}")
    table.add_row("optimum", f"{best:.3f}", "")
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        table.add_row(name, f"{value:.3f}", f"{value / best - 1:+.1%}")
    Console().print(table)
