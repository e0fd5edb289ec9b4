"""Imports point downwards: a layer knows only the layers below it, and no import closes a cycle."""

from __future__ import annotations

import ast
from pathlib import Path

import kvist

ROOT = Path(kvist.__file__).parent
LAYERS = [
    "model",
    "http",
    "prefix",
    "cache",
    "routing",
    "workloads",
    "engine",
    "sim",
    "gateway",
    "picker",
    "plugins",
    "launch",
    "optimum",
    "spread",
    "bench",
    "cachebench",
    "suite",
    "routesuite",
    "theory",
    "demo",
    "report",
    "cli",
    "__main__",
]


def imports(path: Path, *, lazy: bool) -> set[str]:
    """kvist modules that a file imports; lazy: also those inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else _eager(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kvist":
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] == "kvist")
    return found


def _eager(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those in functions and under `if TYPE_CHECKING`."""
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found.append(node)
        stack.extend(ast.iter_child_nodes(node))
    return found


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def sources() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_every_module_has_a_layer() -> None:
    unknown = {m for m in sources() if (name := layer(m)) is not None and name not in LAYERS}
    assert not unknown, f"place these in LAYERS: {sorted(unknown)}"


def test_imports_point_downwards() -> None:
    wrong = []
    for module, path in sources().items():
        own = layer(module)
        for target in imports(path, lazy=True):
            other = layer(target)
            if own is None or other is None or other not in LAYERS or own == other:
                continue
            if LAYERS.index(other) > LAYERS.index(own):
                wrong.append(f"{module} -> {target}")
    assert not wrong, sorted(wrong)


def test_no_import_cycles() -> None:
    modules = sources()
    graph = {m: {t for t in imports(p, lazy=False) if t in modules and t != m} for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in sorted(graph[module]):
            if not module.startswith(f"{target}."):  # a package is imported before its modules anyway
                visit(target, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())
