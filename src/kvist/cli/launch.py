"""`kvist launch`: real engines and the gateway in front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvist.cli.options import Config, Seed


def register(app: typer.Typer) -> None:
    app.command()(launch)


def launch(
    model: Annotated[str, typer.Option(help="Model folder, or its name on the Hugging Face hub.")],
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Engines to start.")] = 1,
    eviction: Annotated[
        str, typer.Option(help="Eviction policy inside the engines; without it the engine's own.")
    ] = "",
    policy: Annotated[str, typer.Option(help="Routing policy.")] = "lbgr",
    host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port the gateway listens on.")] = 8000,
    worker_host: Annotated[str, typer.Option(help="Address the engines listen on.")] = "127.0.0.1",
    worker_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the first engine, the others follow; 0: any free.")
    ] = 8001,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of one engine.")] = 1,
    gpus: Annotated[
        str, typer.Option(help="GPUs to share out, as 0,1,2,3; without it all that are visible.")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(help="Folder with tokenizer.json for the gateway; without it the model's.")
    ] = "",
    serve_config: Annotated[
        Path | None, typer.Option(help="TOML file with further settings of the gateway (kvist serve).")
    ] = None,
    engine_command: Annotated[
        str, typer.Option(help="What starts an engine, in place of this Python's own, as 'uv run vllm'.")
    ] = "",
    startup_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds an engine may take to start.")
    ] = 1200,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to end in, before a process is killed.")] = 30,
    seed: Seed = 0,
    config: Config = None,
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="-- ENGINE_ARGS", help="Passed on to each engine.")
    ] = None,
) -> None:
    """Start engines with KV events on and a gateway in front; keep them running until Ctrl-C."""
    import asyncio
    import os
    import shlex
    import tempfile

    from kvist.launch.machine import take_ports, tokenizer_folder, visible_gpus
    from kvist.launch.plan import Wanted, make_plan
    from kvist.launch.supervise import Failed, Times, supervise
    from kvist.routing import make_policy

    make_policy(policy)  # a wrong one shows before anything starts
    if serve_config is not None and not serve_config.is_file():
        raise ValueError(f"--serve-config {serve_config}: no such file")
    devices = [device.strip() for device in gpus.split(",") if device.strip()] or visible_gpus(os.environ)
    folder = tokenizer or tokenizer_folder(model)
    with tempfile.TemporaryDirectory(prefix="kvist-") as events:
        plan = make_plan(
            Wanted(
                engine=engine,
                model=model,
                replicas=replicas,
                events=Path(events),
                eviction=eviction,
                policy=policy,
                host=host,
                port=port,
                worker_host=worker_host,
                worker_ports=take_ports(worker_host, worker_port, replicas),
                tensor_parallel_size=tensor_parallel_size,
                gpus=devices,
                tokenizer=folder,
                serve_config=str(serve_config or ""),
                engine_command=shlex.split(engine_command),
                extra=engine_args or [],
                seed=seed,
            ),
            os.environ,
        )
        if not folder:
            _say(
                "launch", f"no tokenizer.json found for {model}: the gateway routes by text, give --tokenizer"
            )
        urls = ", ".join(command.url for command in plan.engines)
        times = Times(startup=startup_timeout, grace=grace)

        def ready() -> None:
            _say("launch", f"ready at {plan.gateway.url}, in front of {urls}; Ctrl-C stops everything")

        try:
            asyncio.run(supervise(plan, dict(os.environ), _say, times, ready=ready))
        except Failed as error:
            typer.echo(f"kvist: {error}", err=True)
            raise typer.Exit(1) from None


def _say(name: str, line: str) -> None:
    typer.echo(f"[{name}] {line}")
