"""`kvist picker`: the endpoint picker for Envoy and the Kubernetes Gateway API Inference Extension.

Its options are the fields of `kvist.picker.settings.PickerSettings`, and those of the local set-up.
"""

from __future__ import annotations

import inspect
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvist.cli.serve import SINGULAR, assignment, parameters

if TYPE_CHECKING:
    from kvist.picker.settings import PickerSettings

OWN_PORTS = ("grpc_port", "grpc_health_port", "metrics_port", "host")  # the local set-up picks free ones


def register(app: typer.Typer) -> None:
    from kvist.picker.settings import NOT_HERE, PickerSettings

    own = inspect.signature(_own_options, eval_str=True).parameters.values()
    command: Any = picker
    command.__signature__ = inspect.Signature([*own, *parameters(PickerSettings, NOT_HERE)])
    command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}
    app.command()(command)


def _own_options(
    *,
    local: Annotated[
        int | None,
        typer.Option(min=1, help="Start this many embedded engines and a real Envoy around the picker."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Envoy's port, with --local.")] = 8000,
    fail_open: Annotated[
        bool, typer.Option(help="Without a picker Envoy goes on by round robin, else 503; with --local.")
    ] = False,
    envoy_config: Annotated[
        Path | None,
        typer.Option(help="Write Envoy's bootstrap for --endpoints and this picker to a file, and end."),
    ] = None,
) -> None:
    """What is not a setting of the picker itself."""


def picker(
    local: int | None = None,
    port: int = 8000,
    fail_open: bool = False,
    envoy_config: Path | None = None,
    config: Path | None = None,
    **given: Any,
) -> None:
    """Pick endpoints for Envoy: it moves the bytes, the policy decides."""
    plural = {single: name for name, single in SINGULAR.items()}
    chosen = {plural.get(k, k): value for k, value in given.items() if value is not None and value != []}
    for name in ("objectives", "policy_params"):
        if name in chosen:
            option = f"--{SINGULAR[name].replace('_', '-')}"
            chosen[name] = dict(assignment(text, option) for text in chosen[name])
    if "endpoints" in chosen:
        chosen["endpoints"] = [part for text in chosen["endpoints"] for part in text.split(",") if part]
    from kvist.picker.settings import build, load
    from kvist.routing import make_policy

    values = {**(load(config) if config is not None else {}), **chosen}
    if "NAMESPACE" in os.environ:
        values.setdefault("pool_namespace", os.environ["NAMESPACE"])
    settings = build(values, str(config or "kvist picker"))
    make_policy(settings.policy, **settings.policy_arguments())  # a wrong one shows before anything starts
    if envoy_config is not None:
        _write_envoy(settings, envoy_config, port, fail_open)
    elif local is not None:
        if settings.endpoints or settings.pool_name:
            raise ValueError("--local starts its own engines: leave --endpoints and --pool-name out")
        _run_local(local, port, fail_open, settings.secure_serving, chosen, config)
    elif settings.endpoints or settings.pool_name:
        _run(settings)
    else:
        raise ValueError("give --endpoints, --pool-name or --local: where else should requests go?")


def _run(settings: PickerSettings) -> None:
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


def _write_envoy(settings: PickerSettings, path: Path, port: int, fail_open: bool) -> None:
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


def _run_local(
    workers: int, port: int, fail_open: bool, secure: bool, chosen: dict[str, Any], config: Path | None
) -> None:
    _need_extra()
    from kvist.demo.envoy import LocalPool

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children must not outlive this process
    with LocalPool(
        workers, port=port, picker=_options(chosen, config), fail_open=fail_open, secure=secure
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


def _options(chosen: dict[str, Any], config: Path | None) -> list[str]:
    """The command line that says the same."""
    import json

    found = [f"--config={config}"] if config is not None else []
    for name, value in chosen.items():
        option = "--" + SINGULAR.get(name, name).replace("_", "-")
        if name in OWN_PORTS:
            continue
        if isinstance(value, dict):
            found += [f"{option}={key}={json.dumps(item)}" for key, item in value.items()]
        elif isinstance(value, list):
            found += [f"{option}={item}" for item in value]
        elif isinstance(value, bool):
            found.append(option if value else f"--no-{option[2:]}")
        else:
            found.append(f"{option}={value}")
    return found
