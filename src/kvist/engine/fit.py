"""Fitting a latency profile to measurements: least squares of the relative error, no coefficient negative.

The form (see `kvist.engine.latency`) is linear but for max(w, b * N). Given the number of tokens from which a
step is bound by compute, it is linear; that number is searched for among those seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvist.engine.latency import COEFFICIENTS, LatencyProfile
from kvist.engine.measured import Measured, Observation

# Seconds of one unit of each coefficient, in the order of COEFFICIENTS.
UNITS = (1e-3, 1e-3, 1e-6, 1e-9, 1e-9, 1e-6)
_KNEES = 48  # numbers of tokens tried
_SHORTEST = 8  # output tokens of a decode phase worth looking at
_PREEMPTED = 3  # times the usual time a token: a request this slow was preempted
_Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Fit:
    """coefficients: by their names in a profile. error: mean absolute relative error, worst: the largest."""

    coefficients: dict[str, float]
    error: float
    worst: float
    observations: int

    def predict(self, observation: Observation) -> float:
        """Seconds."""
        return _predict(np.array([self.coefficients[name] for name in COEFFICIENTS]), observation)


def fit(observations: Sequence[Observation]) -> Fit:
    """The coefficients that fit best. Raises ValueError for fewer observations than coefficients.

    Needs SciPy (non-negative least squares): the extra `optimum`.
    """
    if len(observations) < len(COEFFICIENTS):
        raise ValueError(
            f"{len(observations)} measurements are too few for {len(COEFFICIENTS)} coefficients: measure "
            "prompts of several lengths and decode batches of several sizes"
        )
    sizes = sorted({tokens for seen in observations for _, tokens in seen.steps})
    at = np.linspace(0, len(sizes) - 1, min(len(sizes), _KNEES)).astype(int)
    knees = [0.0, *(sizes[i] for i in at)]
    best = min((_solve(observations, knee) for knee in knees), key=lambda found: _loss(found, observations))
    errors = _errors(best, observations)
    values = dict(zip(COEFFICIENTS, best.tolist(), strict=True))
    return Fit(values, float(np.mean(np.abs(errors))), float(np.max(np.abs(errors))), len(observations))


def _solve(observations: Sequence[Observation], knee: float) -> _Array:
    """Coefficients if steps of up to `knee` tokens are bound by memory and larger ones by compute."""
    try:
        from scipy.optimize import nnls
    except ModuleNotFoundError:
        raise ValueError("fitting needs SciPy: pip install 'kvist[optimum]'") from None
    rows = []
    for seen in observations:
        small = sum(number for number, tokens in seen.steps if tokens <= knee)
        large = sum(number * tokens for number, tokens in seen.steps if tokens > knee)
        steps = sum(number for number, _ in seen.steps)
        parts = (steps, small, large, seen.prefill, seen.decode_kv, seen.decodes)
        rows.append([part * unit / seen.seconds for part, unit in zip(parts, UNITS, strict=True)])
    matrix = np.array(rows)
    scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1.0)
    solution, _ = nnls(matrix / scale, np.ones(len(rows)))
    return np.asarray(solution / scale)


def _predict(coefficients: _Array, seen: Observation) -> float:
    a, w, b, c, d, e = (float(value) * unit for value, unit in zip(coefficients, UNITS, strict=True))
    steps = sum(number * (a + max(w, b * tokens)) for number, tokens in seen.steps)
    return steps + c * seen.prefill + d * seen.decode_kv + e * seen.decodes


def _errors(coefficients: _Array, observations: Sequence[Observation]) -> _Array:
    return np.array([_predict(coefficients, seen) / seen.seconds - 1 for seen in observations])


def _loss(coefficients: _Array, observations: Sequence[Observation]) -> float:
    return float(np.sum(_errors(coefficients, observations) ** 2))


def observe(log: Sequence[Measured], max_num_batched_tokens: int = 2048) -> list[Observation]:
    """What a log of requests says of steps: the prefills, and each request's decode phase.

    Steps are not in such a log; they are inferred. Requests whose first tokens came at the same moment were
    prefilled together; a decode phase of k tokens took k steps, among them those of the prefills that overlap
    it; contexts grow evenly from first to last token. Left out: prefills that shared steps with the one
    before, decode phases of fewer than 8 tokens, and those so long that the request was preempted. Cached
    prefixes are not seen: a log without prefix sharing and without memory pressure fits best.
    """
    batches = _batches(log, max_num_batched_tokens)
    starts = np.array([row.first_token for row in log])
    ends = np.array([row.last_token for row in log])
    lengths = np.array([row.input_tokens for row in log], dtype=float)
    outputs = np.array([row.output_tokens - 1 for row in log], dtype=float)
    rates = outputs / np.maximum(ends - starts, 1e-9)  # tokens a second
    found = []
    for batch in batches:
        if batch.shared:
            continue
        at = (batch.start + batch.end) / 2
        running = (starts <= batch.start) & (ends >= batch.end)
        decodes = float(running.sum())
        kv = float((lengths + rates * (at - starts))[running].sum()) * batch.steps
        each = batch.tokens / batch.steps + decodes
        seconds = batch.end - batch.start
        found.append(Observation(seconds, ((batch.steps, each),), batch.work, kv, decodes * batch.steps))
    several = outputs >= _SHORTEST
    if not several.any():
        return found
    usual = float(np.median(1 / rates[several]))
    begins, finishes = np.array([b.start for b in batches]), np.array([b.end for b in batches])
    for row, count in zip(log, outputs.tolist(), strict=True):
        length = row.last_token - row.first_token
        if count < _SHORTEST or length > _PREEMPTED * usual * count:
            continue
        left, right = np.maximum(starts, row.first_token), np.minimum(ends, row.last_token)
        share = np.clip(right - left, 0, None) / length
        kv = float(((lengths + rates * ((left + right) / 2 - starts)) * share).sum()) * count
        busy = float(share.sum())
        overlap = np.minimum(finishes, row.last_token) - np.maximum(begins, row.first_token)
        part = np.clip(overlap, 0, None) / np.maximum(finishes - begins, 1e-9)
        inside = [(batches[i], float(part[i])) for i in np.flatnonzero(part > 0)]
        steps = tuple((b.steps * share, b.tokens / b.steps + busy) for b, share in inside)
        plain = max(count - sum(number for number, _ in steps), 0.0)
        work = sum(b.work * share for b, share in inside)
        found.append(Observation(length, ((plain, busy), *steps), work, kv, busy * count))
    return found


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts whose first tokens came at the same moment. shared: part of it ran in the steps of another."""

    start: float
    end: float
    tokens: int
    steps: int
    work: float
    shared: bool


def _batches(log: Sequence[Measured], budget: int) -> list[_Batch]:
    groups: dict[float, list[Measured]] = {}
    for row in log:
        groups.setdefault(row.first_token, []).append(row)
    found: list[_Batch] = []
    previous = float("-inf")
    for end, rows in sorted(groups.items()):
        start = min(row.scheduled for row in rows)
        tokens = sum(row.input_tokens for row in rows)
        work = sum(row.input_tokens**2 / 2 for row in rows)
        found.append(_Batch(start, end, tokens, -(-tokens // budget), work, start < previous))
        previous = end
    return found


def to_profile(result: Fit, **fields: object) -> LatencyProfile:
    """A profile with the fitted coefficients; `fields` are the rest of it."""
    return LatencyProfile(**result.coefficients, fit_error=result.error, **fields)  # type: ignore[arg-type]
