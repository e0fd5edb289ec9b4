"""The command line: one Typer app, one file per command. `main` is the entry point."""

from __future__ import annotations

import importlib
import sys

import typer

COMMANDS = ("policies",)

app = typer.Typer(name="kvist", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    for command in COMMANDS:
        importlib.import_module(f"kvist.cli.{command}").register(app)
    try:
        app()
    except ValueError as error:  # the library's word for bad input
        typer.echo(f"kvist: {error}", err=True)
        sys.exit(2)
