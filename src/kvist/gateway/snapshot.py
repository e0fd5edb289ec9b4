"""Learned coefficients on disk: written atomically, read at start-up."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from kvist.routing import RoutingPolicy

VERSION = 1


def save(policy: RoutingPolicy, path: Path) -> None:
    """Replace the file in one step: a crash leaves the old one or the new one. Raises OSError."""
    data = msgspec.json.encode({"version": VERSION, "policy": policy.name, "state": policy.snapshot()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(policy: RoutingPolicy, path: Path) -> bool:
    """Give a policy its learned state back; False if there is none or another policy's. Raises ValueError."""
    if not path.exists():
        return False
    try:
        data = msgspec.json.decode(path.read_bytes())
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(f"version {VERSION} expected")
        if data.get("policy") != policy.name:
            return False
        policy.restore(data["state"])
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise ValueError(f"snapshot {path}: {error}: delete it to start afresh") from None
    return True
