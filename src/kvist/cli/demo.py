"""`kvist demo`: the main job, end to end, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.options import Config, Json, Seed


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a group; 128 groups.")] = 20,
    rate: Annotated[float, typer.Option(min=0.1, help="Modelled requests/s.")] = 12.0,
    speed: Annotated[float, typer.Option(min=0.1, help="Modelled seconds a second.")] = 10.0,
    workers: Annotated[int, typer.Option(min=1, help="Embedded engines.")] = 4,
    traces: Annotated[Path, typer.Option(help="Folder with real traces; used if it is there.")] = Path(
        "../shared/traces"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the HTML report.")] = Path("out/demo"),
    seed: Seed = 0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Start a gateway and 4 embedded engines, send real HTTP traffic, compare a usual set-up with kvist's."""
    import signal
    import sys

    import msgspec
    from rich.console import Console

    from kvist.cli.progress import progress
    from kvist.demo.run import OURS, USUAL, Scale, caution, compare, verdict
    from kvist.demo.trace import trace_rows
    from kvist.report.demo import demo_table, legend, write
    from kvist.report.table import bench_tables

    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started is stopped again
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    scale = Scale(prompts=prompts, rate=rate, speed=speed, workers=workers, seed=seed)
    console = Console(stderr=as_json)
    console.print(f"{scale.describe()}. Once with a usual set-up, once with kvist's.\n", highlight=False)
    with progress(2 * scale.groups * prompts, "sending requests") as advance:
        trials = compare([USUAL, OURS], scale, advance)
    usual, ours = setups = [trial.setup for trial in trials]
    words, warning = verdict(usual, ours), caution(setups, speed)
    if not as_json:
        console.print(demo_table(usual, ours))
        console.print(f"[dim]{legend(usual, ours, speed)}[/]\n", highlight=False)
        console.print(words, highlight=False)
    if warning:
        console.print(f"[yellow]{warning}[/]", highlight=False)
    rows = []
    trace = traces / "mooncake_conversation.jsonl"
    if trace.exists():
        console.print(f"\nSimulator on a real trace, {trace.name}:", highlight=False)
        with progress(4, "simulating") as advance:
            rows = trace_rows(trace, seed, advance)
        if not as_json:
            for table in bench_tables(rows, console.width):
                console.print(table)
    write(trials, words, warning, scale.describe(), rows, out)
    if as_json:
        data = {
            "setups": setups,
            "verdict": words,
            "caution": warning,
            "trace": [row.to_dict() for row in rows],
        }
        typer.echo(msgspec.json.encode(data).decode())
    else:
        console.print(f"report: {out / 'report.html'}", highlight=False)
