"""Calibration finds known coefficients again, and says what is wrong with a table."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from kvist.cache import PrefixCache, make_eviction
from kvist.cli import complete
from kvist.engine import Engine, load_profile
from kvist.engine.fit import fit, observe
from kvist.engine.latency import COEFFICIENTS, LatencyProfile, to_toml
from kvist.engine.measured import Observation, read_log, read_steps
from kvist.model import Query, pack

pytest.importorskip("scipy", reason="fitting needs SciPy (extra: optimum)")


def steps(profile: LatencyProfile, noise: float, seed: int = 1) -> list[dict[str, float]]:
    """A grid of steps such as one measures, with multiplicative noise."""
    rng = Random(seed)

    def latency(n: int, p: int, b: int, kv: int) -> float:
        return 1e3 * profile.step(n + b, n * (p + n / 2), kv, b) * (1 + rng.uniform(-noise, noise))

    grid = [(n, p, 0, 0) for n in (16, 64, 128, 256, 512, 1024, 2048, 4096) for p in (0, 2000, 8000, 30000)]
    grid += [(0, 0, b, b * kv) for b in (1, 4, 16, 64, 128, 256) for kv in (100, 1000, 4000)]
    grid += [(n, p, b, b * 2000) for n in (500, 1500) for p in (0, 4000) for b in (8, 64)]
    return [
        {
            "prefill_tokens": n,
            "prefill_context": p,
            "decode_seqs": b,
            "decode_kv": kv,
            "latency_ms": 1e3
            * profile.step(n + b, n * (p + n / 2), kv, b)
            * (1 + rng.uniform(-noise, noise)),
        }
        for n, p, b, kv in grid
    ]


def write_csv(path: Path, rows: list[dict[str, float]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["llama-3.1-8b-l40s", "llama-3.1-8b-rtx4090", "llama-3.1-70b-4xh100"])
def test_recovers_exact_steps(tmp_path: Path, name: str) -> None:
    profile = load_profile(name)
    result = fit(read_steps(write_csv(tmp_path / "steps.csv", steps(profile, 0.0))))
    for field in COEFFICIENTS:
        assert result.coefficients[field] == pytest.approx(getattr(profile, field), rel=1e-3), field
    assert result.error < 1e-6


def test_recovers_noisy_steps(tmp_path: Path) -> None:
    profile = load_profile("llama-3.1-8b-l40s")
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in steps(profile, 0.03)))
    result = fit(read_steps(file))
    assert result.error < 0.03 and result.worst < 0.08
    found = result.coefficients
    assert found["a_ms"] + found["w_ms"] == pytest.approx(profile.a_ms + profile.w_ms, rel=0.05)
    assert found["b_us_per_token"] == pytest.approx(profile.b_us_per_token, rel=0.08)
    assert found["c_ns_per_token_context"] == pytest.approx(profile.c_ns_per_token_context, rel=0.08)
    assert found["d_us_per_1k_kv"] == pytest.approx(profile.d_us_per_1k_kv, rel=0.08)


def test_a_log_of_the_model_itself_gives_its_step_times_back(tmp_path: Path) -> None:
    """Steps are not in a log, only inferred, so single coefficients are not exact; times are close."""
    profile = load_profile("llama-3.1-8b-l40s")
    rng = Random(2)
    engine = Engine(PrefixCache(190_000, make_eviction("l-lru")), profile)
    rows, now, due = [], 0.0, 0.0
    for number in range(250):
        due += rng.expovariate(1.5)
        while not engine.idle and now < due:
            end = engine.begin_steps(now, due)
            assert end is not None
            now = end
            engine.end_step(now)
        now = max(now, due)
        tokens = [number * 10_000 + i for i in range(rng.randrange(20, 3000))]
        output = rng.randrange(2, 200)
        rows.append(engine.submit(Query(number, pack(tokens), output_tokens=output), due))
    while (end := engine.begin_steps(now)) is not None:
        now = end
        engine.end_step(now)
    file = tmp_path / "log.jsonl"
    with file.open("w") as out:
        for request in rows:
            row = {
                "input_toks": request.query.length,
                "output_toks": request.query.output_tokens,
                "queued_ts": request.submitted,
                "scheduled_ts": request.admitted,
                "first_token_ts": request.first_token,
                "last_token_ts": request.finished,
            }
            out.write(json.dumps(row) + "\n")
    result = fit(observe(read_log(file)))
    assert result.error < 0.1
    for n, p, b, kv in ((0, 0, 8, 12_000), (0, 0, 20, 30_000), (1000, 0, 8, 12_000), (2000, 0, 0, 0)):
        work = n * (p + n / 2)
        seen = Observation(1.0, ((1, n + b),), work, kv, b)
        assert result.predict(seen) == pytest.approx(profile.step(n + b, work, kv, b), rel=0.15)


def test_too_few_measurements() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([Observation(0.1, ((1, 10.0),), 0.0, 0.0, 0.0)] * 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no steps"),
        ("latency_ms,prefill_tokens\n1.0,-5\n", r"steps\.csv:2: field 'prefill_tokens'"),
        ("latency_ms,prefill_tokens\n1.0,5\nfast,5\n", r"steps\.csv:3: field 'latency_ms'"),
        ("latency_ms,prefill_tokens\n0,5\n", "latency_ms must be above 0"),
        ("latency_ms,tokens\n1.0,5\n", "unknown column 'tokens'"),
        ("prefill_tokens\n5\n", "'latency_ms' is missing"),
        ("latency_ms\n5\n", "without prefill_tokens"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "steps.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_steps(file)


def test_toml_round_trip(tmp_path: Path) -> None:
    for name in ("llama-3.1-8b-l40", "llama-3.1-8b-rtx4090"):
        profile = load_profile(name)
        file = tmp_path / f"{name}.toml"
        file.write_text(to_toml(profile))
        assert load_profile(file) == profile


def test_the_command_writes_a_profile_that_loads(tmp_path: Path) -> None:
    profile = load_profile("llama-3.1-8b-h100")
    table = write_csv(tmp_path / "steps.csv", steps(profile, 0.01))
    out = tmp_path / "own.toml"
    found = CliRunner().invoke(
        complete(), ["calibrate", str(table), "--kv-tokens", "5000", "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    own = load_profile(out)
    assert own.capacity == 5000 and own.fit_error is not None and own.fit_error < 0.02
    assert own.step(2000, 2e6, 0, 0) == pytest.approx(profile.step(2000, 2e6, 0, 0), rel=0.03)
