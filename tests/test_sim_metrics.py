"""Sketch and load series against exact computations."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.sim.metrics import LoadSeries, Sketch


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_quantiles_within_half_a_percent(values: list[float]) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    for q in (0.0, 0.5, 0.9, 0.99, 1.0):
        exact = float(np.quantile(values, q, method="lower"))
        assert sketch.quantile(q) == pytest.approx(exact, rel=0.0051, abs=1e-9)
    summary = sketch.summary()
    assert summary.mean == pytest.approx(float(np.mean(values)))
    assert summary.count == len(values) and summary.max == max(values)


def test_the_sketch_stays_small() -> None:
    rng = Random(0)
    sketch = Sketch()
    for _ in range(50_000):
        sketch.add(rng.lognormvariate(0, 3))
    assert len(sketch.buckets) < 3000
    assert Sketch().summary().p99 == 0 and Sketch().quantile(0.5) == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    gap=st.sampled_from([0.001, 0.1, 3.0]),
    points=st.sampled_from([2, 7, 32]),
)
def test_load_series_keeps_the_area(seed: int, gap: float, points: int) -> None:
    """The mean level times the bucket widths is the exact integral of the level, whatever was folded."""
    rng = Random(seed)
    series = LoadSeries(10.0, points)
    now, level = 10.0, {"a": 0, "b": 0}
    exact, since = {"a": 0.0, "b": 0.0}, {"a": 10.0, "b": 10.0}
    for _ in range(100):
        now += rng.expovariate(1 / gap)
        worker = rng.choice("ab")
        delta = rng.choice((1, 2)) if level[worker] == 0 else rng.choice((1, -1))
        series.change(worker, now, delta)
        exact[worker] += level[worker] * (now - since[worker])
        level[worker] += delta
        since[worker] = now
    found = series.finish(now)
    times = found["time"]
    assert len(times) <= points
    widths = np.diff([*times, now - 10.0])
    for worker in "ab":
        exact[worker] += level[worker] * (now - since[worker])
        assert float(np.dot(found[worker], widths)) == pytest.approx(exact[worker], rel=1e-6, abs=1e-9)
