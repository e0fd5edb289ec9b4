"""Where queries come from: generators, datasets and traces, by name."""

from __future__ import annotations

import inspect
from typing import Any

from kvist.workloads.base import Workload
from kvist.workloads.conversations import ShareGPT, UltraChat
from kvist.workloads.gsp import GSP
from kvist.workloads.loogle import LooGLE
from kvist.workloads.mixes import RAG, Agents, Chats, Scan, Tenants
from kvist.workloads.trace import Trace

WORKLOADS: dict[str, type[Workload]] = {
    w.name: w for w in (GSP, ShareGPT, UltraChat, LooGLE, Chats, RAG, Agents, Tenants, Scan, Trace)
}


def make_workload(spec: str, *, rate: float | None = None, seed: int = 0) -> Workload:
    """A workload from `name[:FILE][:key=value,…]`, as in `gsp:order=grouped` or `trace:FILE:speed=2`.

    Raises ValueError naming the workload, the parameter and the choices.
    """
    name, *parts = spec.split(":")
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}: choose one of {', '.join(WORKLOADS)}")
    given: dict[str, Any] = {}
    if parts and "=" in parts[-1]:
        for pair in parts.pop().split(","):
            key, sep, value = pair.partition("=")
            if not sep:
                raise ValueError(f"workload {spec!r}: {pair!r} is not key=value")
            given[key.strip()] = value.strip()
    workload = WORKLOADS[name]
    known = inspect.signature(workload).parameters
    for key, value in given.items():
        if key not in workload.params:
            choices = ", ".join(workload.params)
            raise ValueError(f"workload {name}: unknown parameter {key!r}: choose one of {choices}")
        given[key] = _convert(value, str(known[key].annotation), f"workload {name}: {key}")
    file = ":".join(parts)
    if file:
        if "file" not in known:
            raise ValueError(f"workload {name} takes no file")
        given["file"] = file
    return workload(rate=rate, seed=seed, **given)


def _convert(value: str, kind: str, what: str) -> Any:
    try:
        return float(value) if kind.startswith("float") else int(value) if kind.startswith("int") else value
    except ValueError:
        raise ValueError(f"{what} must be a number, not {value!r}") from None


__all__ = ["WORKLOADS", "Workload", "make_workload"]
