"""Measurements of real engines: steps from a table, requests from a log. Errors name file, line and field.

A table of steps is CSV with a header, or JSON lines. One row is one step:

    latency_ms       how long the step took
    prefill_tokens   new prompt tokens in it (0)
    prefill_context  tokens before each of these chunks: cached, or computed in earlier steps (0)
    prefill_seqs     how many equal chunks the prompt tokens are of (1)
    decode_seqs      sequences that decoded one token (0)
    decode_kv        context tokens of these sequences together (0)

A log of requests is JSON lines in the format of LLMServingSim's vLLM runs: `input_toks` and `output_toks`,
and in seconds on the engine's clock `queued_ts`, `first_token_ts`, `last_token_ts` and, for fitting,
`scheduled_ts`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.workloads.files import count, field, records

STEP_COLUMNS = ("prefill_tokens", "prefill_context", "prefill_seqs", "decode_seqs", "decode_kv")


@dataclass(frozen=True, slots=True)
class Observation:
    """Time that one or several steps took together, in seconds.

    steps: (how many, new tokens in each). prefill: sum of n * (p + n / 2) over prompt chunks. decode_kv and
    decodes: context tokens and decoding sequences, summed over the steps.
    """

    seconds: float
    steps: tuple[tuple[float, float], ...]
    prefill: float
    decode_kv: float
    decodes: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One request of a log: lengths in tokens, times in seconds on the engine's clock."""

    input_tokens: int
    output_tokens: int
    queued: float
    scheduled: float
    first_token: float
    last_token: float


def read_steps(path: Path) -> list[Observation]:
    """A table of measured steps."""
    rows = _csv(path) if path.suffix == ".csv" else records(path)
    found = []
    for number, row in rows:
        where = f"{path}:{number}"
        unknown = sorted(set(row) - {"latency_ms", *STEP_COLUMNS})
        if unknown:
            known = ", ".join(("latency_ms", *STEP_COLUMNS))
            raise ValueError(f"{where}: unknown column {unknown[0]!r}: the columns are {known}")
        latency = float(field(row, "latency_ms", (int, float), where))
        if not 0 < latency < float("inf"):
            raise ValueError(f"{where}: latency_ms must be above 0, not {latency}")
        prompt, context, chunks, decodes, kv = (
            count(row, name, where) if name in row else int(name == "prefill_seqs") for name in STEP_COLUMNS
        )
        if prompt + decodes < 1:
            raise ValueError(f"{where}: a step without prefill_tokens and without decode_seqs")
        chunks = max(chunks, 1)
        work = prompt * (context + prompt / chunks / 2)
        found.append(Observation(latency * 1e-3, ((1, prompt + decodes),), work, kv, decodes))
    if not found:
        raise ValueError(f"{path}: no steps")
    return found


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield reader.line_num, {key: _number(value) for key, value in row.items() if value != ""}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _number(text: Any) -> Any:
    """An int where it is one, else a float, else what it was (the check of the field will name it)."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def read_log(path: Path) -> list[Measured]:
    """A log of requests; `scheduled` is `queued` where the log does not have it."""
    log = []
    for number, row in records(path):
        where = f"{path}:{number}"
        queued, first, last = (
            float(field(row, name, (float, int), where))
            for name in ("queued_ts", "first_token_ts", "last_token_ts")
        )
        scheduled = (
            float(field(row, "scheduled_ts", (float, int), where)) if "scheduled_ts" in row else queued
        )
        if not queued <= scheduled < first <= last:
            raise ValueError(
                f"{where}: queued_ts, scheduled_ts, first_token_ts, last_token_ts must be in this order"
            )
        tokens = [count(row, name, where, least=1) for name in ("input_toks", "output_toks")]
        log.append(Measured(tokens[0], tokens[1], queued, scheduled, first, last))
    if not log:
        raise ValueError(f"{path}: no requests")
    return log


def is_log(path: Path) -> bool:
    """Whether a file is a log of requests rather than a table of steps, by its first row."""
    if path.suffix == ".csv":
        return False
    first = next(records(path), None)
    return first is not None and "queued_ts" in first[1]
