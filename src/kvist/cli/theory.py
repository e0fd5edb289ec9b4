"""`kvist theory`: competitive ratios against cache size."""

from __future__ import annotations

from typing import Annotated

import typer

from kvist.cli.options import Config, Json, Out, Seed, listed, numbers


def register(app: typer.Typer) -> None:
    app.command()(theory)


def theory(
    sizes: Annotated[list[str], typer.Option(help="Cache sizes in tokens.")] = [
        "10,30,100,300,1000,3000,10000"
    ],
    policies: Annotated[list[str], typer.Option(help="Eviction policies.")] = ["l-lru,rlt,hedge"],
    rounds: Annotated[int, typer.Option(min=2, help="Times the adversary goes round.")] = 6,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to average randomized policies over.")] = 10,
    against: Annotated[
        str, typer.Option(help="Adversary: cycle, trap (first trains a predictor badly) or hunter.")
    ] = "cycle",
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Measure eviction policies' cost over the offline optimum's, on an adversary's sequence."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from kvist.cache import EVICTIONS
    from kvist.theory import fit, growth, measure

    names = listed(policies, "--policies", list(EVICTIONS))
    rows = measure(
        [int(n) for n in numbers(sizes, "--sizes")],
        names,
        rounds=rounds,
        seeds=seeds,
        seed=seed,
        against=against,
    )
    fits = {
        name: {shape: fit(rows, name, shape) for shape in ("linear", "log")} if len(rows) > 1 else {}
        for name in names
    }
    if out is not None:
        from kvist.report.theory import write

        write(rows, names, fits, out)
    if as_json:
        typer.echo(msgspec.json.encode({"rows": rows, "fits": fits}).decode())
        return
    table = Table(title=f"Misses over the offline optimum's ({against})")
    table.add_column("cache tokens", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row.n:,}", *(f"{row.ratios[name]:.2f}" for name in names))
    console = Console()
    console.print(table)
    for name, by in fits.items():
        if by:
            other = min(by.items(), key=lambda item: item[1].r2)
            console.print(f"{name} {growth(by)} (as {other[0]}: R2 {other[1].r2:.4f})")
