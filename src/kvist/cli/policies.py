"""`kvist policies`: every policy with its description, parameters and source."""

from __future__ import annotations

import typer

from kvist.cli.options import Json


def register(app: typer.Typer) -> None:
    app.command()(policies)


def policies(as_json: Json = False) -> None:
    """List the routing and eviction policies."""
    import msgspec
    from rich.console import Console
    from rich.table import Table

    from kvist.cache import EVICTIONS
    from kvist.engine.order import ORDERS
    from kvist.routing import ROUTERS
    from kvist.workloads import WORKLOADS

    kinds = {"routing": ROUTERS, "eviction": EVICTIONS, "workload": WORKLOADS}
    rows = [
        {
            "kind": kind,
            "name": name,
            "description": policy.description,
            "params": policy.params,
            "source": policy.source,
        }
        for kind, registry in kinds.items()
        for name, policy in registry.items()  # type: ignore[attr-defined]
    ]
    rows += [
        {
            "kind": "queue",
            "name": name,
            "description": order.description,
            "params": {},
            "source": order.source,
        }
        for name, order in ORDERS.items()
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
