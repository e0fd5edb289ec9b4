"""`kvist serve`: the gateway in front of running workers.

Its options are the fields of `kvist.gateway.settings.Settings`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import msgspec
import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvist.gateway.settings import Settings

SINGULAR = {
    "api_keys": "api_key",
    "allow_paths": "allow_path",
    "policy_params": "policy_param",
    "objectives": "objective",
}
SECONDS = ("timeout", "interval", "duration")  # also known with -secs, as SGLang's router has them


def register(app: typer.Typer) -> None:
    from kvist.gateway.settings import Settings

    command: Any = serve
    command.__signature__ = signature = inspect.Signature(parameters(Settings))
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    app.command()(command)


def parameters(settings: type[msgspec.Struct], without: Collection[str] = ()) -> list[inspect.Parameter]:
    """One keyword for each setting that has a description, and --config. None: not given."""
    found = []
    for field in msgspec.structs.fields(settings):
        if get_origin(field.type) is not Annotated or field.name in without:
            continue
        kind, meta = get_args(field.type)
        name = SINGULAR.get(field.name, field.name)
        flags = list(dict.fromkeys([f"--{name}".replace("_", "-"), f"--{field.name}".replace("_", "-")]))
        if name.endswith(SECONDS):
            flags.append(f"{flags[0]}-secs")
        if kind is bool:
            flags[0] += f"/--no-{flags[0][2:]}"
        if get_origin(kind) in (list, dict):
            kind = list[str]
        default = "" if field.default in ("", 0, None, False, msgspec.NODEFAULT) else f" ({field.default})"
        option = typer.Option(*flags, help=meta.description + default)
        found.append(_keyword(name, Annotated[kind | None, option]))
    config = typer.Option(help="TOML file with any setting; options given here win.")
    found.append(_keyword("config", Annotated[Path | None, config]))
    return found


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def serve(config: Path | None = None, **given: Any) -> None:
    """Route OpenAI traffic to a fleet of workers."""
    from kvist.gateway.settings import build, load_settings

    plural = {single: name for name, single in SINGULAR.items()}
    chosen = {plural.get(k, k): value for k, value in given.items() if value is not None and value != []}
    if "policy_params" in chosen:
        chosen["policy_params"] = dict(map(assignment, chosen["policy_params"]))

    def settings() -> Settings:
        base = load_settings(config) if config is not None else {}
        return build({**base, **chosen}, str(config or "kvist serve"))

    first = settings()
    from kvist.routing import make_policy

    make_policy(first.policy, **first.policy_arguments())  # a wrong one shows before anything starts
    if not first.embedded:
        _run(first, settings)
        return
    from kvist.cli.embedded import engines

    with engines(first) as started:
        about = "timing and caching are modelled, the text is filler"
        typer.echo(f"{first.embedded} embedded engines, models of {first.profile}: {about}", err=True)

        def with_engines() -> Settings:
            given = settings()
            return msgspec.structs.replace(given, workers=[*given.workers, *started])

        _run(with_engines(), with_engines)


def _run(settings: Settings, reload: Callable[[], Settings]) -> None:
    from kvist.gateway.serve import run

    try:
        run(settings, reload)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"cannot listen on {settings.host}:{settings.port}: {reason}: choose another --port"
        ) from None


def assignment(text: str, option: str = "--policy-param") -> tuple[str, Any]:
    """NAME=VALUE; the value as JSON where it is that, else as text. Raises typer.BadParameter."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{option}: {text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
