"""Learned coefficients, and the index if asked for, on disk: written atomically, read at start-up."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvist.model import WorkerState
from kvist.prefix.index import PrefixIndex
from kvist.routing import RoutingPolicy

VERSION = 1


def save(policy: RoutingPolicy, path: Path) -> None:
    """Replace the file in one step: a crash leaves the old one or the new one. Raises OSError."""
    state = {"version": VERSION, "policy": policy.name, "state": policy.snapshot()}
    replace(path, msgspec.json.encode(state))


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another in one step. Raises OSError."""
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


def save_index(index: PrefixIndex, workers: Iterable[WorkerState], path: Path) -> None:
    """What the gateway's own index holds of its workers, into FILE.index. Raises OSError."""
    state = index.snapshot({worker.slot: worker.id for worker in workers})
    replace(index_file(path), msgspec.msgpack.encode({"version": VERSION, **state}))


def load_index(index: PrefixIndex, workers: Iterable[WorkerState], path: Path) -> bool:
    """Give an empty index what it held of the workers that are here; False without a file.

    Raises ValueError for a broken file, or one of another kind of prompts.
    """
    file = index_file(path)
    if not file.exists():
        return False
    try:
        state = msgspec.msgpack.decode(file.read_bytes())
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise ValueError(f"version {VERSION} expected")
        index.restore(state, {worker.id: worker.slot for worker in workers})
    except (msgspec.DecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"snapshot {file}: {error}: delete it to start afresh") from None
    return True


def index_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")
