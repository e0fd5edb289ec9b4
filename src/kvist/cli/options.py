"""Options that several commands share."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a TOML file: the command's own table before the keys at the top level."""
    if path is None:
        return None
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    command, group = context.command, context.parent.command if context.parent else None
    others = getattr(group, "commands", {command.name: command})
    everywhere = {param.name for other in others.values() for param in other.params}
    own = {param.name: param for param in command.params}
    values: dict[str, Any] = {}
    for table, known in ((data, everywhere), (data.get(command.name or "", {}), set(own))):
        for key, value in table.items():
            name = key.replace("-", "_")
            if isinstance(value, dict) and table is data and key in others:
                continue
            if name not in known:
                raise ValueError(f"--config {path}: unknown option {key!r} of kvist {command.name}")
            if name in own:
                many = getattr(own[name], "multiple", False)
                values[name] = [value] if many and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def prepare_out(path: Path | None) -> Path | None:
    """Make the folder now, and see that plots can be drawn, rather than after minutes of work."""
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: {error.strerror or error}: give a folder that can be made") from None
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--out needs matplotlib: pip install 'kvist[plot]'")
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=load_config, help="TOML file of options."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Seed = Annotated[int, typer.Option(help="Makes a run repeatable, bit for bit.")]
Out = Annotated[
    Path | None, typer.Option(callback=prepare_out, help="Folder for CSV, JSON, plots and one HTML page.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Processes to run in.")]


def listed(values: list[str], what: str, known: list[str] | None = None) -> list[str]:
    """Values given one by one or joined by commas. Raises typer.BadParameter for one that is not known."""
    found = [part.strip() for value in values for part in value.split(",") if part.strip()]
    for value in found:
        if known is not None and value not in known:
            raise typer.BadParameter(f"{what}: unknown {value!r}: choose from {', '.join(known)}")
    if not found:
        raise typer.BadParameter(f"{what}: give at least one")
    return found


def numbers(values: list[str], what: str) -> list[float]:
    """Positive numbers, given one by one or joined by commas."""
    found = []
    for value in listed(values, what):
        try:
            number = float(value)
        except ValueError:
            raise typer.BadParameter(f"{what}: {value!r} is not a number") from None
        if not 0 < number < float("inf"):
            raise typer.BadParameter(f"{what}: must be above 0, not {value}")
        found.append(number)
    return found
