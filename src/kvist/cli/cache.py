"""`kvist cache`: hit rate against cache size for every eviction policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.options import Config, Jobs, Json, Out, Seed, listed


def register(app: typer.Typer) -> None:
    app.command()(cache)


def cache(
    workload: Annotated[
        str, typer.Argument(metavar="TRACE", help="A trace file, or a workload as in kvist bench.")
    ],
    policies: Annotated[list[str], typer.Option(help="Eviction policies; belady is the offline optimum.")] = [
        "l-lru,rlt,l-lfu,belady"
    ],
    sizes: Annotated[
        list[str], typer.Option(help="Cache sizes in tokens (500k, 2M), or in % of the working set.")
    ] = ["1%,3%,10%,30%,100%"],
    rate: Annotated[float | None, typer.Option(help="Requests/s of a generated workload.")] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for the randomized policies.")] = 1,
    seed: Seed = 0,
    jobs: Jobs = 1,
    out: Out = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Hit rate of one cache against its size, with the offline optimum as the ceiling."""
    import msgspec
    from rich.console import Console

    from kvist.cache import EVICTIONS
    from kvist.cachebench import run, working_set
    from kvist.cli.progress import progress
    from kvist.report.cache import cache_table, write
    from kvist.workloads import WORKLOADS, make_workload

    spec = workload
    name = workload.split(":")[0]
    if name not in WORKLOADS and (Path(name).suffix or "/" in name or Path(name).exists()):
        spec = f"trace:{workload}"
    described = make_workload(spec, rate=rate, seed=seed).describe()
    names = listed(policies, "--policies", list(EVICTIONS))
    wanted = listed(sizes, "--sizes")
    title = described
    distinct = 0
    if any(size.endswith("%") for size in wanted):
        distinct, most = working_set(spec, rate, seed, block_size)
        title += f"\nworking set {distinct:,} tokens, an unbounded cache hits {most:.1%}"
    tokens = sorted({parse_size(size, distinct, block_size) for size in wanted})
    with progress(len(names), "replaying") as advance:
        points = run(
            spec,
            names,
            tokens,
            rate=rate,
            block_size=block_size,
            seeds=seeds,
            seed=seed,
            jobs=jobs,
            progress=advance,
        )
    if out is not None:
        write(points, title, out)
    if as_json:
        typer.echo(msgspec.json.encode(points).decode())
        return
    Console().print(cache_table(points, title))


def parse_size(text: str, working_set: int, block_size: int) -> int:
    """Tokens from `200000`, `500k`, `2M` or `10%` of the working set; at least one block for a share."""
    units = {"k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6, "%": working_set / 100}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)
    except ValueError:
        raise typer.BadParameter(f"--sizes: {text!r} is not a size: use 200000, 500k, 2M or 10%") from None
    if text.endswith("%") and value > 0:
        value = max(value, block_size)
    if not block_size <= value < float("inf"):
        raise typer.BadParameter(
            f"--sizes: {text} is below one block of {block_size} tokens: use a larger cache"
        )
    return int(value)
