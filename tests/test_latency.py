"""Latency profiles: the shipped ones, the formula, and what is said of a bad file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.engine.latency import LatencyProfile, load_profile, profile_names

EXPECTED = {
    "llama-3.1-8b-l40",
    "llama-3.1-8b-l40s",
    "llama-3.1-8b-a100-80g",
    "llama-3.1-8b-h100",
    "llama-3.1-8b-h200",
    "llama-3.1-8b-rtx4090",
    "llama-3.1-70b-4xh100",
    "llama-3.1-70b-4xh200",
}
GOOD = """
name = "own"
model = "m"
gpu = "g"
source = "measured"
a_ms = 1.0
w_ms = 4.0
b_us_per_token = 10.0
c_ns_per_token_context = 2.0
d_us_per_1k_kv = 50.0
e_us_per_sequence = 3.0
kv_tokens = 1000
"""


def test_all_profiles_ship_with_a_source_and_memory() -> None:
    assert set(profile_names()) >= EXPECTED
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name
        assert "AIConfigurator" in profile.source or "LLMServingSim" in profile.source
        assert profile.capacity > 10_000


def test_l40_is_an_estimate_from_l40s() -> None:
    estimate, measured = load_profile("llama-3.1-8b-l40"), load_profile("llama-3.1-8b-l40s")
    assert estimate.estimate and not measured.estimate
    assert estimate.b_us_per_token == pytest.approx(2 * measured.b_us_per_token)
    assert estimate.c_ns_per_token_context == pytest.approx(2 * measured.c_ns_per_token_context)
    assert estimate.d_us_per_1k_kv == measured.d_us_per_1k_kv


def test_the_formula_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(GOOD)
    profile = load_profile(file)
    # 600 prompt tokens behind 400, 2 decodes over 3000 tokens: the compute term, 6.02 ms, beats the weights.
    work = 600 * (400 + 300)
    expected = 1e-3 + 602 * 10e-6 + 2e-9 * work + 50e-6 * 3 + 2 * 3e-6
    assert profile.step(602, work, 3000, 2) == pytest.approx(expected)
    assert profile.step(2, 0.0, 3000, 2) == pytest.approx(1e-3 + 4e-3 + 150e-6 + 6e-6)


@given(
    tokens=st.integers(1, 10_000),
    context=st.integers(0, 100_000),
    decodes=st.integers(0, 256),
    more=st.integers(0, 5_000),
)
def test_more_work_never_takes_less_time(tokens: int, context: int, decodes: int, more: int) -> None:
    profile = load_profile("llama-3.1-8b-h100")
    base = profile.step(tokens, tokens * context, context, decodes)
    assert base > 0
    assert profile.step(tokens + more, tokens * context, context, decodes) >= base
    assert profile.step(tokens, tokens * (context + more), context + more, decodes + 1) >= base


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("a_ms = 1.0", "a_ms = -1.0"), "a_ms"),
        (("a_ms = 1.0", "a_ms = nan"), "a_ms"),
        (("b_us_per_token = 10.0", 'b_us_per_token = "fast"'), "b_us_per_token"),
        (("d_us_per_1k_kv = 50.0", ""), "d_us_per_1k_kv"),
        (("kv_tokens = 1000", "kv_tokens = 0"), "kv_tokens"),
        (("kv_tokens = 1000", ""), "kv_tokens"),
        (("kv_tokens = 1000", "kv_tokenz = 1000"), "kv_tokenz"),
        (("a_ms = 1.0", "a_ms 1.0"), "TOML"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(GOOD.replace(*change))
    with pytest.raises(ValueError, match=said) as caught:
        load_profile(file)
    assert "own.toml" in str(caught.value)
    assert not isinstance(caught.value, msgspec.ValidationError)


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama-3\.1-8b-h100"):
        load_profile("h1000")
    with pytest.raises(ValueError, match=r"none\.toml"):
        load_profile(tmp_path / "none.toml")


def test_capacity_from_memory() -> None:
    profile = LatencyProfile(
        name="x", model="m", gpu="g", source="s", a_ms=1, w_ms=1, b_us_per_token=1,
        c_ns_per_token_context=1, d_us_per_1k_kv=1, e_us_per_sequence=1,
        gpus=2, gpu_memory_gib=10, memory_utilization=0.9, activations_gib=1, weights_gib=12,
        kv_bytes_per_token=1 << 20,
    )  # fmt: skip
    assert profile.capacity == (2 * (10 * 0.9 - 1) - 12) * 1024
