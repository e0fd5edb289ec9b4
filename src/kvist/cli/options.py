"""Options that several commands share."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults from a TOML file: the command's own table, else the top level."""
    if path is None:
        return None
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    command = context.command
    table = data.get(command.name or "", data)
    known = {param.name for param in command.params}
    values = {key.replace("-", "_"): value for key, value in table.items() if not isinstance(value, dict)}
    for key in values:
        if key not in known:
            raise ValueError(f"--config {path}: unknown option {key!r} of kvist {command.name}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=load_config, help="TOML file of options."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Seed = Annotated[int, typer.Option(help="Makes a run repeatable, bit for bit.")]
Out = Annotated[Path | None, typer.Option(help="Folder for CSV, JSON, plots and one HTML page.")]
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
