"""`kvist policies`: every policy with its description, parameters and source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from kvist.cli.options import Config, Json


def register(app: typer.Typer) -> None:
    app.command()(policies)


def policies(as_json: Json = False, config: Config = None) -> None:
    """List every routing, eviction and queue policy and every workload."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from kvist.cache import EVICTIONS
    from kvist.engine.order import ORDERS
    from kvist.routing import ROUTERS
    from kvist.workloads import WORKLOADS

    kinds: dict[str, Mapping[str, Any]] = {
        "routing": ROUTERS,
        "eviction": EVICTIONS,
        "queue": ORDERS,
        "workload": WORKLOADS,
    }
    rows = [
        {
            "kind": kind,
            "name": name,
            "description": policy.description,
            "params": policy.params,
            "source": policy.source,
        }
        for kind, registry in kinds.items()
        for name, policy in registry.items()
    ]
    if as_json:
        typer.echo(msgspec.json.encode(rows).decode())
        return
    table = Table(show_lines=True)
    for column in ("kind", "name", "what it does", "parameters", "source"):
        table.add_column(column)
    for row in rows:
        params = "\n".join(f"{key}: {text}" for key, text in row["params"].items())
        table.add_row(row["kind"], row["name"], row["description"], params or "-", row["source"])
    Console().print(table)
