"""`kvist picker`: the endpoint picker for Envoy and the Kubernetes Gateway API Inference Extension."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command()(picker)


def picker(
    endpoints: Annotated[list[str] | None, typer.Option(help="Endpoints, each ip:port.")] = None,
    pool_name: Annotated[str | None, typer.Option(help="InferencePool to find endpoints by.")] = None,
    pool_namespace: Annotated[
        str | None, typer.Option(envvar=["KVIST_PICKER_POOL_NAMESPACE", "NAMESPACE"], help="[default].")
    ] = None,
    pool_group: Annotated[
        str | None, typer.Option(help="API group of the pool [inference.networking.k8s.io].")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="Routing policy [lbgr].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the ext_proc service [9002].")] = None,
    grpc_health_port: Annotated[
        int | None, typer.Option(help="Port of the health service alone [9003]; 0: none.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of /metrics and /workers [9090].")] = None,
    secure_serving: Annotated[bool, typer.Option(help="TLS, as most gateways expect.")] = False,
    cert_path: Annotated[
        str | None, typer.Option(help="Folder with tls.crt and tls.key; without it self-signed.")
    ] = None,
    fallbacks: Annotated[int | None, typer.Option(help="Further endpoints to name [2].")] = None,
    max_in_flight: Annotated[
        int | None, typer.Option(help="Requests at one endpoint before the pool is saturated [no bound].")
    ] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait then [1024].")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds they may wait [60].")] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PRIORITY; below 0: shed when saturated. In a pool also InferenceObjectives."),
    ] = None,
    max_payload_size: Annotated[int | None, typer.Option(help="Bytes of a request body [32 MiB].")] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokenizer files, PATH or MODEL=PATH: prompts become token ids, as in kvist serve."
        ),
    ] = None,
    kv_events: Annotated[
        list[str] | None, typer.Option(help="Follow KV events: a port, or tcp://{host}:{port+1000}.")
    ] = None,
    kv_events_replay: Annotated[list[str] | None, typer.Option(help="Where lost ones are replayed.")] = None,
    cb_failure_threshold: Annotated[
        int | None, typer.Option(help="Failures in a row that open an endpoint's circuit breaker [5].")
    ] = None,
    cb_timeout_duration: Annotated[float | None, typer.Option(help="Seconds it stays open [30].")] = None,
    health_check_interval: Annotated[float | None, typer.Option(help="Seconds between checks [10].")] = None,
    health_check_endpoint: Annotated[str | None, typer.Option(help="[/health].")] = None,
    worker_api_key: Annotated[str | None, typer.Option(help="Key for the endpoints' /v1/models.")] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(help="Seconds that streams get to end on SIGTERM [30].")
    ] = None,
    drain_notice: Annotated[
        float | None, typer.Option(help="Seconds of it in which only the health check fails [3].")
    ] = None,
    snapshot: Annotated[str | None, typer.Option(help="File that keeps what was learned.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the policy.")] = 0,
    local: Annotated[
        int | None,
        typer.Option(min=1, help="Start this many embedded engines and a real Envoy around the picker."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --local: Envoy's port.")] = 8000,
    fail_open: Annotated[
        bool, typer.Option(help="With --local: Envoy goes on by round robin without a picker, else 503.")
    ] = False,
    envoy_config: Annotated[
        Path | None,
        typer.Option(help="Write Envoy's bootstrap for --endpoints and this picker to a file, and end."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any setting; options given here win.")
    ] = None,
) -> None:
    """Pick endpoints for Envoy: it moves the bytes, the policy decides."""
    given: dict[str, Any] = {
        "endpoints": [part for text in endpoints or [] for part in text.split(",") if part],
        "pool_name": pool_name,
        "pool_namespace": pool_namespace,
        "pool_group": pool_group,
        "policy": policy,
        "host": host,
        "grpc_port": grpc_port,
        "grpc_health_port": grpc_health_port,
        "metrics_port": metrics_port,
        "secure_serving": secure_serving or None,
        "cert_path": cert_path,
        "fallbacks": fallbacks,
        "max_in_flight": max_in_flight,
        "queue_size": queue_size,
        "queue_timeout": queue_timeout,
        "objectives": _objectives(objective or []),
        "max_payload_size": max_payload_size,
        "tokenizer": tokenizer,
        "kv_events": kv_events,
        "kv_events_replay": kv_events_replay,
        "cb_failure_threshold": cb_failure_threshold,
        "cb_timeout_duration": cb_timeout_duration,
        "health_check_interval": health_check_interval,
        "health_check_endpoint": health_check_endpoint,
        "worker_api_key": worker_api_key,
        "drain_timeout": drain_timeout,
        "drain_notice": drain_notice,
        "snapshot": snapshot,
        "seed": seed or None,
    }
    chosen = {name: value for name, value in given.items() if value is not None and value not in ([], {})}
    from kvist.picker.settings import build, load

    settings = build({**(load(config) if config else {}), **chosen}, str(config or "kvist picker"))
    from kvist.routing import make_policy

    make_policy(settings.policy, **settings.policy_params)  # a wrong one shows before anything starts
    if envoy_config is not None:
        _write_envoy(settings, envoy_config, port, fail_open)
        return
    if local is not None:
        if settings.endpoints or settings.pool_name:
            raise ValueError("--local starts its own engines: leave --endpoints and --pool-name out")
        _run_local(local, port, fail_open, chosen)
        return
    if not settings.endpoints and not settings.pool_name:
        raise ValueError("give --endpoints, --pool-name or --local: where else should requests go?")
    _need_extra()
    from kvist.picker.serve import run

    try:
        run(settings)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot listen on {settings.host}: {reason}: choose other ports") from None


def _need_extra() -> None:
    for module in ("envoy.service.ext_proc.v3", "grpc_health.v1", "hpack", "httptools"):
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}: pip install 'kvist[picker]'") from None


def _objectives(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        name, _, priority = text.partition("=")
        try:
            found[name] = int(priority)
        except ValueError:
            raise ValueError(f"--objective {text!r} must look like chat=10") from None
    return found


def _write_envoy(settings: Any, path: Path, port: int, fail_open: bool) -> None:
    import msgspec

    from kvist.picker.envoy import bootstrap

    if not settings.endpoints:
        raise ValueError("--envoy-config needs --endpoints: a fixed list of them")
    data = bootstrap(
        settings.endpoints,
        port=port,
        picker=f"{settings.host}:{settings.grpc_port}",
        fail_open=fail_open,
        secure=settings.secure_serving,
        retries=settings.fallbacks,
        health_path=settings.health_check_endpoint,
    )
    path.write_bytes(msgspec.json.format(msgspec.json.encode(data)) + b"\n")


def _run_local(workers: int, port: int, fail_open: bool, chosen: dict[str, Any]) -> None:
    _need_extra()
    from kvist.demo.envoy import LocalPool

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children must not outlive this process
    passed = []
    for name, value in chosen.items():
        if name in ("grpc_port", "grpc_health_port", "metrics_port", "host"):
            continue
        option = "--" + name.replace("_", "-")
        if name == "objectives":
            passed += [f"--objective={key}={priority}" for key, priority in value.items()]
        else:
            passed.append(option if value is True else f"{option}={value}")
    with LocalPool(
        workers, port=port, picker=passed, fail_open=fail_open, secure=bool(chosen.get("secure_serving"))
    ) as pool:
        typer.echo(f"Envoy on {pool.url} (OpenAI API), picker's metrics on {pool.picker_url}/metrics")
        typer.echo(f"{workers} embedded engines: timing and caching are modelled, the text is filler")
        typer.echo(f"failure mode: {'open: round robin' if fail_open else 'closed: 503'}; Ctrl-C ends all")
        try:
            while (ended := pool.ended()) is None:
                time.sleep(0.5)
        except KeyboardInterrupt:
            return
        raise ValueError(f"{ended}: the others are stopped too")
