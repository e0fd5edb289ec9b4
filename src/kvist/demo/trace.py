"""A short comparison on a real trace, in the simulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvist.bench import Cell, Row, run
from kvist.sim import SimConfig

PAIRS = (
    ("cache_aware", "l-lru"),
    ("lbgr", "l-lru"),
    ("lbgr", "rlt"),
    ("lbgr", "hedge"),
    ("lmetric", "l-lru"),
)
REQUESTS = 3000
PROFILE = "llama-3.1-8b-h100"
WORKERS = 8


def trace_rows(trace: Path, seed: int, progress: Callable[[], None]) -> list[Row]:
    """The first requests of a Mooncake trace on a fleet that can carry them, blocks of 16 tokens."""
    cells = [
        Cell(
            f"trace:{trace}:limit={REQUESTS}",
            None,
            SimConfig(
                router=router, eviction=eviction, workers=WORKERS, profile=PROFILE, block_size=16, seed=seed
            ),
        )
        for router, eviction in PAIRS
    ]
    return run(cells, 1, 1, progress)
