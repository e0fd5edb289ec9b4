"""The command line: one Typer app, one file per command. `main` is the entry point.

Every option is read from the command line, else from the environment (KVIST_<COMMAND>_<OPTION>), else from
the TOML file of `--config` (the table named as the command, else top-level keys), else from its default.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import typer
from typer.main import get_command

COMMANDS = (  # in the order of --help
    "demo",
    "serve",
    "launch",
    "picker",
    "engine",
    "bench",
    "cache",
    "theory",
    "optimum",
    "policies",
    "fidelity",
    "calibrate",
)

app = typer.Typer(
    name="kvist",
    help="The cache-and-load brain for fleets of LLM servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps `kvist COMMAND` a group however many commands there are."""


@functools.cache
def complete() -> typer.Typer:
    """The app with every command in it."""
    for command in COMMANDS:
        importlib.import_module(f"kvist.cli.{command}").register(app)
    return app


def spread(argv: list[str], multiple: set[str]) -> list[str]:
    """`--urls A B C` as `--urls A --urls B --urls C`, for the options in `multiple`."""
    out: list[str] = []
    option = ""
    taken = 0
    for i, word in enumerate(argv):
        if word == "--":
            return out + argv[i:]
        if word.startswith("-") and not _is_number(word):
            option, taken = (word if word in multiple else ""), 0
        elif option:
            if taken:
                out.append(option)
            taken += 1
        out.append(word)
    return out


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _multiple(command: Any) -> set[str]:
    return {name for p in command.params if getattr(p, "multiple", False) for name in p.opts}


def main(argv: list[str] | None = None) -> None:
    """Run kvist. Bad input ends in one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    group = get_command(complete())
    commands = getattr(group, "commands", {})
    if argv and argv[0] in commands:
        argv = [argv[0], *spread(argv[1:], _multiple(commands[argv[0]]))]
    try:
        code = group.main(argv, prog_name="kvist", auto_envvar_prefix="KVIST", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ValueError as error:  # the library's word for bad input
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error}: install the extra that brings it, as in pip install 'kvist[plot]'")
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors all have it
            raise
        _fail(error.format_message() or f"give a command: {', '.join(commands)}")
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    typer.echo(f"kvist: {' '.join(message.split())}", err=True)
    sys.exit(2)
