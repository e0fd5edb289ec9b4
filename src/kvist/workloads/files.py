"""Reading data files: JSON lines, JSON lists, gzip; errors name the file and the line."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec


def open_bytes(path: Path) -> IO[bytes] | gzip.GzipFile:
    """Raises ValueError if the file cannot be opened."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 and the lines that are not blank."""
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects of a .json list or of JSON lines, with their line (or place in the list) from 1."""
    with open_bytes(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start == b"[":
        with open_bytes(path) as file:
            rows = decode(file.read(), f"{path}")
        for number, row in enumerate(rows, 1):
            yield number, _object(row, f"{path}: entry {number}")
    else:
        for number, line in lines(path):
            yield number, _object(decode(line, f"{path}:{number}"), f"{path}:{number}")


def decode(data: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record. Raises ValueError naming the place, the field and what is expected."""
    value = row.get(name)
    if name not in row:
        raise ValueError(f"{where}: field {name!r} is missing")
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where}: field {name!r} must be {names}, not {type(value).__name__}")
    return value


def count(row: dict[str, Any], name: str, where: str, *, least: int = 0) -> int:
    value = field(row, name, int, where)
    if value < least:
        raise ValueError(f"{where}: field {name!r} must be at least {least}, not {value}")
    return int(value)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object expected, not {type(row).__name__}")
    return row
