"""`kvist engine`: one embedded engine."""

from __future__ import annotations

from typing import Annotated

import typer

from kvist.cli.options import Config, Seed


def register(app: typer.Typer) -> None:
    app.command()(engine)


def engine(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    profile: Annotated[str, typer.Option(help="GPU and model: a shipped name or a .toml path.")] = (
        "llama-3.1-8b-l40"
    ),
    eviction: Annotated[str, typer.Option(help="Eviction policy.")] = "hedge",
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV cache in tokens; without it what the GPU's memory leaves.")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests running at once.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 2048,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait before 503.")] = 1024,
    order: Annotated[str, typer.Option(help="Order of the waiting queue.")] = "fcfs",
    speed: Annotated[float, typer.Option(help="Modelled seconds a second.")] = 1.0,
    model: Annotated[str, typer.Option(help="Name in the API; without it the profile's model.")] = "",
    kv_events: Annotated[
        str, typer.Option(help="ZeroMQ address to publish KV events on, as tcp://127.0.0.1:5557.")
    ] = "",
    kv_events_replay: Annotated[str, typer.Option(help="ZeroMQ address that replays them.")] = "",
    kv_events_topic: Annotated[str, typer.Option(help="Topic of the KV events.")] = "kv-events",
    seed: Seed = 0,
    config: Config = None,
) -> None:
    """Serve an OpenAI API from a model of an engine: real batching, caching and timing, filler text."""
    from random import Random

    from kvist.cache import EVICTIONS, PrefixCache, make_eviction
    from kvist.cli.options import listed
    from kvist.engine.core import Engine
    from kvist.engine.driver import Driver
    from kvist.engine.kv_events import Publisher
    from kvist.engine.latency import load_profile
    from kvist.engine.server import EngineServer, run

    listed([eviction], "--eviction", [name for name in EVICTIONS if name != "belady"])
    chosen = load_profile(profile)
    publisher = Publisher(kv_events, kv_events_replay, kv_events_topic) if kv_events else None
    cache = PrefixCache(
        kv_tokens or chosen.capacity,
        make_eviction(eviction, rng=Random(seed)),
        block_size=block_size,
        on_event=publisher.add if publisher else None,
    )
    core = Engine(
        cache,
        chosen,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        queue=order,
        stream=True,
    )

    def make() -> EngineServer:
        return EngineServer(
            Driver(core, speed), model or chosen.model, max_waiting=max_waiting, publisher=publisher
        )

    def ready(at: int) -> None:
        typer.echo(
            f"kvist engine on http://{host}:{at}: a model of {chosen.model} on {chosen.gpu}, {eviction}, "
            f"{cache.capacity:,} KV tokens; timing and caching are modelled, the text is filler",
        )

    try:
        run(make, host, port, ready)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot listen on {host}:{port}: {reason}: choose another --port") from None
