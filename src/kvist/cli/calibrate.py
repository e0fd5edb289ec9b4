"""`kvist calibrate`: fit a latency profile to measured steps or to an engine's request log."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.cli.options import Config, Json

if TYPE_CHECKING:
    from kvist.engine.measure import Model, Step


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


def calibrate(
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV cache of the engine, in tokens.")],
    table: Annotated[
        Path | None,
        typer.Argument(
            help="CSV or JSON lines. One step a row: latency_ms, prefill_tokens, prefill_context, "
            "prefill_seqs, decode_seqs, decode_kv. Or a request log: input_toks, output_toks, scheduled_ts, "
            "first_token_ts, last_token_ts."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Measure here instead, with PyTorch: cpu, cuda or cuda:N.")
    ] = "",
    shape: Annotated[
        str, typer.Option(help="What to measure: a shape's name or a model's config.json.")
    ] = "llama-3.1-8b",
    longest: Annotated[int, typer.Option(min=16, help="Longest prompt to measure, in tokens.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Largest decode batch to measure.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="Measure about a third of the steps.")] = False,
    steps: Annotated[Path | None, typer.Option(help="CSV file for the measured steps.")] = None,
    out: Annotated[Path | None, typer.Option(help="TOML file to write; else it is printed.")] = None,
    name: Annotated[str, typer.Option(help="Name of the profile.")] = "own",
    model: Annotated[str, typer.Option(help="What was served; default with --device: the shape.")] = "",
    gpu: Annotated[str, typer.Option(help="On what; default with --device: what the device is called.")] = "",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one engine.")] = 1,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="The engine's tokens a step at most (request log only).")
    ] = 2048,
    json: Json = False,
    config: Config = None,
) -> None:
    """Fit a latency profile to measured steps, to a request log, or to steps measured here and now."""
    import msgspec

    from kvist.engine.fit import fit, observe, to_profile
    from kvist.engine.latency import to_toml
    from kvist.engine.measure import grid
    from kvist.engine.measured import is_log, read_log, read_steps

    if (table is None) == (not device):
        raise ValueError("give either a TABLE of measurements or --device to measure here")
    if table is None:
        with tempfile.TemporaryDirectory() as folder:
            file = steps if steps is not None else Path(folder) / "steps.csv"
            found = _measure(device, shape, grid(longest, batch, quick=quick), file)
            seen, kind = read_steps(file), "steps"
        origin = f"measured with PyTorch {found.torch.__version__}, shape {shape}, {found.dtype}"
        model, gpu = model or shape, gpu or found.name
    elif is_log(table):
        seen, kind = observe(read_log(table), max_num_batched_tokens), "phases of a request log"
        origin = table.name
    else:
        seen, kind, origin = read_steps(table), "steps", table.name
    result = fit(seen)
    profile = to_profile(
        result,
        name=name,
        model=model or "unknown",
        gpu=gpu or "unknown",
        gpus=gpus,
        kv_tokens=kv_tokens,
        source=f"kvist calibrate: {len(seen)} {kind}, {origin}",
    )
    if out is not None:
        try:
            out.write_text(to_toml(profile), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out {out}: {error.strerror or error}") from None
    if json:
        data = {"profile": msgspec.to_builtins(profile), "error": result.error, "worst": result.worst}
        typer.echo(msgspec.json.encode(data).decode())
        return
    typer.echo(f"{len(seen)} {kind}: mean error {result.error:.1%}, worst {result.worst:.1%}", err=True)
    typer.echo(f"wrote {out}" if out is not None else to_toml(profile), err=out is not None)


def _measure(device: str, shape: str, todo: list[Step], file: Path) -> Model:
    """Measure steps into a CSV file; the model that was measured."""
    from rich.console import Console
    from rich.progress import track

    from kvist.engine.measure import Model, load_shape, measure

    model = Model(load_shape(shape), device)
    rows = measure(model, todo)
    console = Console(stderr=True)
    try:
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = None
            for row in track(rows, "measuring", len(todo), console=console, disable=not console.is_terminal):
                if writer is None:
                    writer = csv.DictWriter(out, list(row))
                    writer.writeheader()
                writer.writerow(row)
                out.flush()  # what was measured stays, whatever happens next
    except OSError as error:
        raise ValueError(f"--steps {file}: {error.strerror or error}") from None
    return model
