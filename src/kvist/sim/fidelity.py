"""The engine model beside a real engine: replay a measured run and compare.

The log is described in `kvist.engine.measured`. Prompts come from a second file of JSON lines, in the same
order, with `input_tok_ids`; without it no prompt shares a prefix with another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvist.engine.measured import Measured
from kvist.model import Query, pack
from kvist.sim.base import SimConfig, SimResult, Summary
from kvist.sim.cluster import simulate
from kvist.workloads.files import field, records


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric: what was measured, what the model says, in seconds."""

    name: str
    real: float
    model: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is 10 % too slow."""
        return self.model / self.real - 1


def read_prompts(path: Path, log: list[Measured]) -> list[bytes]:
    """Packed prompts in the log's order. Raises ValueError where they do not fit the log."""
    prompts = []
    for number, row in records(path):
        where = f"{path}:{number}"
        ids = field(row, "input_tok_ids", list, where)
        try:
            prompts.append(pack(np.array(ids, dtype=np.uint32)))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{where}: input_tok_ids must be token ids from 0 to {2**32 - 1}") from None
        if number <= len(log) and len(ids) != log[number - 1].input_tokens:
            raise ValueError(
                f"{where}: {len(ids)} token ids, but the log's request {number} has "
                f"{log[number - 1].input_tokens} input_toks: are these the log's requests?"
            )
    if len(prompts) != len(log):
        raise ValueError(f"{path}: {len(prompts)} requests, but the log has {len(log)}")
    return prompts


def replay(log: list[Measured], prompts: list[bytes] | None, config: SimConfig) -> SimResult:
    """Run the log's requests through one engine of `config`, each arriving when the real one queued it."""
    start = min(row.queued for row in log)
    if prompts is None:
        prompts = [pack(np.arange(row.input_tokens) + (i << 16)) for i, row in enumerate(log)]
    queries = [
        Query(i, prompt, output_tokens=row.output_tokens, arrival=row.queued - start)
        for i, (row, prompt) in enumerate(zip(log, prompts, strict=True))
    ]
    queries.sort(key=lambda query: query.arrival)
    return simulate(queries, config)


def compare(log: list[Measured], result: SimResult) -> list[Figure]:
    """Mean and p90 of TTFT, TPOT and latency. Raises ValueError if the model did not serve every request."""
    if result.completed != len(log):
        raise ValueError(
            f"the model served {result.completed} of the log's {len(log)} requests: "
            "give the KV capacity of the engine that was measured"
        )
    ttft = [row.first_token - row.queued for row in log]
    tpot = [
        (row.last_token - row.first_token) / (row.output_tokens - 1) for row in log if row.output_tokens > 1
    ]
    latency = [row.last_token - row.queued for row in log]
    figures = []
    for name, real, model in (
        ("TTFT", ttft, result.ttft),
        ("TPOT", tpot, result.tpot),
        ("latency", latency, result.latency),
    ):
        figures += _figures(name, real, model)
    return figures


def _figures(name: str, real: list[float], model: Summary) -> list[Figure]:
    if not real:
        return []
    return [
        Figure(f"mean {name}", float(np.mean(real)), model.mean),
        Figure(f"p90 {name}", float(np.percentile(real, 90)), model.p90),
    ]
