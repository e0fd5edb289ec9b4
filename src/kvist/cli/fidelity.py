"""`kvist fidelity`: the engine model beside a real engine's log of the same requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.options import Config, Json


def register(app: typer.Typer) -> None:
    app.command()(fidelity)


def fidelity(
    log: Annotated[Path, typer.Argument(help="JSON lines: what a real engine did, one request a line.")],
    requests: Annotated[
        Path | None, typer.Option(help="JSON lines with the requests' token ids; else no prefix is shared.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Latency profile: a name or a TOML file.")
    ] = "llama-3.1-8b-rtx4090",
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV capacity in tokens; default: the profile's.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a KV block.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Running requests at most.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens a step at most.")] = 2048,
    eviction: Annotated[str, typer.Option(help="Eviction policy; a real vLLM's is l-lru.")] = "l-lru",
    json: Json = False,
    config: Config = None,
) -> None:
    """Replay a real engine's requests through the engine model and print how far apart the two are."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from kvist.engine.measured import read_log
    from kvist.sim.base import SimConfig
    from kvist.sim.fidelity import compare, read_prompts, replay

    measured = read_log(log)
    prompts = read_prompts(requests, measured) if requests is not None else None
    setup = SimConfig(
        router="round_robin",
        workers=1,
        eviction=eviction,
        profile=profile,
        kv_tokens=kv_tokens,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    result = replay(measured, prompts, setup)
    figures = compare(measured, result)
    if json:
        rows = [{"metric": f.name, "real_s": f.real, "model_s": f.model, "error": f.error} for f in figures]
        data = {"requests": len(measured), "profile": profile, "figures": rows, "model": result.to_dict()}
        typer.echo(msgspec.json.encode(data).decode())
        return
    table = Table(title=f"{len(measured)} requests, profile {profile}", title_justify="left")
    for column in ("metric", "real", "model", "error"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for figure in figures:
        table.add_row(figure.name, f"{figure.real:.4g} s", f"{figure.model:.4g} s", f"{figure.error:+.1%}")
    Console().print(table)
