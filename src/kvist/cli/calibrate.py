"""`kvist calibrate`: fit a latency profile to measured steps or to an engine's request log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.options import Config, Json


def register(app: typer.Typer) -> None:
    app.command()(calibrate)


def calibrate(
    table: Annotated[
        Path,
        typer.Argument(
            help="CSV or JSON lines. One step a row: latency_ms, prefill_tokens, prefill_context, "
            "prefill_seqs, decode_seqs, decode_kv. Or a request log: input_toks, output_toks, scheduled_ts, "
            "first_token_ts, last_token_ts."
        ),
    ],
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV cache of the engine, in tokens.")],
    out: Annotated[Path | None, typer.Option(help="TOML file to write; else it is printed.")] = None,
    name: Annotated[str, typer.Option(help="Name of the profile.")] = "own",
    model: Annotated[str, typer.Option(help="What was served.")] = "unknown",
    gpu: Annotated[str, typer.Option(help="On what.")] = "unknown",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one engine.")] = 1,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="The engine's tokens a step at most (request log only).")
    ] = 2048,
    json: Json = False,
    config: Config = None,
) -> None:
    """Fit a latency profile and say how well it fits."""
    import msgspec

    from kvist.engine.fit import fit, observe, to_profile
    from kvist.engine.latency import to_toml
    from kvist.engine.measured import is_log, read_log, read_steps

    from_log = is_log(table)
    seen = observe(read_log(table), max_num_batched_tokens) if from_log else read_steps(table)
    result = fit(seen)
    kind = "phases of a request log" if from_log else "measured steps"
    source = f"kvist calibrate: {len(seen)} {kind}, {table.name}"
    profile = to_profile(
        result, name=name, model=model, gpu=gpu, gpus=gpus, kv_tokens=kv_tokens, source=source
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
