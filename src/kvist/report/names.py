"""Workload specs as a table shows them."""

from __future__ import annotations

from pathlib import Path


def file_name(spec: str) -> str | None:
    """A workload's file without folder and ending, and whether its beginning is skipped; None: no file."""
    _, *rest = spec.split(":")
    if not rest or "=" in rest[0]:
        return None
    name = "_".join(Path(rest[0]).name.split(".")[0].split("_")[:2])
    return f"{name} later" if "skip=" in rest[-1] else name
