"""`kvist serve`: the gateway in front of running workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command()(serve)


def serve(
    worker_urls: Annotated[list[str] | None, typer.Option(help="Base URLs of the workers.")] = None,
    policy: Annotated[str | None, typer.Option(help="Routing policy [lbgr].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Keys that clients must send, plain or sha256:HEX.")
    ] = None,
    admin_key: Annotated[str | None, typer.Option(help="Key for /workers and /policy.")] = None,
    worker_api_key: Annotated[str | None, typer.Option(help="Key sent to the workers.")] = None,
    max_concurrent_requests: Annotated[int | None, typer.Option(help="Requests under way [4096].")] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait [1024].")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds they may wait [60].")] = None,
    rate_limit: Annotated[float | None, typer.Option(help="Requests/s of one key [no limit].")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds a request may take [1800].")] = None,
    first_byte_timeout: Annotated[
        float | None, typer.Option(help="Seconds to the first byte of an answer [300].")
    ] = None,
    slow_client_timeout: Annotated[
        float | None, typer.Option(help="Seconds a client may read nothing [60].")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds that requests get to end on SIGTERM [30].")
    ] = None,
    retry_max_retries: Annotated[int | None, typer.Option(help="Further workers to try [2].")] = None,
    cb_failure_threshold: Annotated[
        int | None, typer.Option(help="Failures in a row that open a worker's circuit breaker [5].")
    ] = None,
    cb_timeout_duration: Annotated[float | None, typer.Option(help="Seconds it stays open [30].")] = None,
    health_check_interval: Annotated[float | None, typer.Option(help="Seconds between checks [10].")] = None,
    health_check_endpoint: Annotated[str | None, typer.Option(help="[/health].")] = None,
    max_payload_size: Annotated[int | None, typer.Option(help="Bytes of a request body [32 MiB].")] = None,
    allow_path: Annotated[
        list[str] | None, typer.Option(help="Further worker paths to pass on (POST).")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(help="Make prompts token ids: folder with tokenizer.json, or MODEL=FOLDER."),
    ] = None,
    kv_events: Annotated[
        list[str] | None,
        typer.Option(help="Follow KV events: port, or tcp://{host}:{port+1000}; one, or one a worker."),
    ] = None,
    kv_events_replay: Annotated[
        list[str] | None, typer.Option(help="Where missed KV events are replayed, likewise.")
    ] = None,
    kv_events_topic: Annotated[str | None, typer.Option(help="Topic of the KV events [any].")] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option(help="Engines behind each worker URL, for their KV events [1].")
    ] = None,
    snapshot: Annotated[str | None, typer.Option(help="File that keeps what was learned.")] = None,
    log_requests: Annotated[bool, typer.Option(help="Log each request, without its text.")] = False,
    tls_cert: Annotated[str | None, typer.Option(help="TLS certificate chain file.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="TLS private key file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the policy.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any setting; options given here win.")
    ] = None,
) -> None:
    """Route OpenAI traffic to a fleet of workers."""
    given: dict[str, Any] = {
        "worker_urls": worker_urls,
        "policy": policy,
        "host": host,
        "port": port,
        "api_keys": api_key,
        "admin_key": admin_key,
        "worker_api_key": worker_api_key,
        "max_concurrent_requests": max_concurrent_requests,
        "queue_size": queue_size,
        "queue_timeout": queue_timeout,
        "rate_limit": rate_limit,
        "request_timeout": request_timeout,
        "first_byte_timeout": first_byte_timeout,
        "slow_client_timeout": slow_client_timeout,
        "drain_timeout": drain_timeout,
        "retry_max_retries": retry_max_retries,
        "cb_failure_threshold": cb_failure_threshold,
        "cb_timeout_duration": cb_timeout_duration,
        "health_check_interval": health_check_interval,
        "health_check_endpoint": health_check_endpoint,
        "max_payload_size": max_payload_size,
        "allow_paths": allow_path,
        "tokenizer": tokenizer,
        "kv_events": kv_events,
        "kv_events_replay": kv_events_replay,
        "kv_events_topic": kv_events_topic,
        "data_parallel_size": data_parallel_size,
        "snapshot": snapshot,
        "log_requests": log_requests or None,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "seed": seed or None,
    }
    chosen = {name: value for name, value in given.items() if value is not None and value != []}
    from kvist.gateway.settings import Settings, build, load_settings

    def settings() -> Settings:
        base = load_settings(config) if config is not None else {}
        return build({**base, **chosen}, str(config or "kvist serve"))

    first = settings()
    from kvist.gateway.serve import run
    from kvist.routing import make_policy

    make_policy(first.policy, **first.policy_params)  # a wrong one shows before anything starts
    try:
        run(first, settings)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"cannot listen on {first.host}:{first.port}: {reason}: choose another --port"
        ) from None
