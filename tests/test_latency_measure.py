"""Measuring steps: the shapes, and on a CPU with PyTorch a tiny model from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvist.cli import complete
from kvist.engine.latency import COEFFICIENTS, load_profile
from kvist.engine.measure import SHAPES, Model, Shape, grid, load_shape
from kvist.engine.measured import read_steps

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_shapes(tmp_path: Path) -> None:
    assert SHAPES["llama-3.1-8b"].kv_elements * 2 == 131072  # bytes a token in bfloat16
    assert SHAPES["llama-3.1-70b"].kv_elements * 2 == 327680
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    assert load_shape(str(config)) == SHAPES["llama-3.1-8b"]
    config.write_text(json.dumps({**LLAMA, "hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config\.json.*hidden_size"):
        load_shape(str(config))
    with pytest.raises(ValueError, match="unknown shape 'huge'"):
        load_shape("huge")
    with pytest.raises(ValueError, match="multiple"):
        Shape(1, 100, 10, 3, 1, 10)


def test_the_grid_stays_within_its_limits() -> None:
    steps = grid(1024, 64)
    assert max(n for n, _, _, _ in steps) == 1024
    assert max(b for _, _, b, _ in steps) == 64
    assert all(bool(n) != bool(b) for n, _, b, _ in steps)
    quick = grid(1024, 64, quick=True)
    assert set(quick) < set(steps) and len(COEFFICIENTS) < len(quick) < len(steps) / 2
    assert max(n for n, _, _, _ in quick) == 1024 and max(b for _, _, b, _ in quick) == 64


def test_a_step_attends_to_its_context_and_writes_the_cache() -> None:
    torch = pytest.importorskip("torch", reason="measuring needs PyTorch (extra: calibrate)")
    model = Model(SHAPES["tiny"], "cpu")
    shape = model.shape
    cache = torch.zeros(shape.layers, 2, 3, shape.kv_heads, 12, shape.head)
    logits = model.step(4, cache)
    assert logits.shape == (3, shape.vocab)
    assert torch.isfinite(logits).all()
    assert (cache[..., :8, :] == 0).all() and (cache[..., 8:, :] != 0).any()
    with pytest.raises(ValueError, match="--device"):
        Model(SHAPES["tiny"], "abacus")


def test_a_prompt_attends_causally_behind_its_context() -> None:
    """The same prompt in one step, and cut in two with the first part cached, ends in the same numbers."""
    torch = pytest.importorskip("torch", reason="measuring needs PyTorch (extra: calibrate)")
    model = Model(SHAPES["tiny"], "cpu")
    shape, inputs = model.shape, torch.randn(1, 12, SHAPES["tiny"].hidden)
    whole = torch.zeros(shape.layers, 2, 1, shape.kv_heads, 12, shape.head)
    parts = whole.clone()
    plain = model._random
    try:
        model._random = lambda *size: inputs[:, 12 - size[1] :]  # type: ignore[method-assign]
        expected = model.step(12, whole)
        parts[..., :7, :] = whole[..., :7, :]
        assert torch.allclose(model.step(5, parts), expected, atol=1e-5)
    finally:
        model._random = plain  # type: ignore[method-assign]
    assert torch.allclose(parts, whole, atol=1e-5)
    wide = torch.zeros(shape.layers, 2, 1, shape.kv_heads, 12, shape.head)
    wide[..., :7, :] = whole[..., :7, :] + 1  # another context, another answer
    model._random = lambda *size: inputs[:, 12 - size[1] :]  # type: ignore[method-assign]
    assert not torch.allclose(model.step(5, wide), expected, atol=1e-3)


def test_weights_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("torch", reason="measuring needs PyTorch (extra: calibrate)")
    assert abs(SHAPES["llama-3.1-8b"].weights - 7.5e9) < 0.1e9  # 8.03e9 without the embedding's 0.53e9
    with pytest.raises(ValueError, match=r"--shape: its weights take .* GiB, cpu has"):
        Model(Shape(1000, 1 << 14, 1 << 16, 128, 8, 128256), "cpu")


@pytest.mark.parametrize("quick", [True, False])
def test_a_tiny_model_is_measured_and_fitted(tmp_path: Path, quick: bool) -> None:
    pytest.importorskip("torch", reason="measuring needs PyTorch (extra: calibrate)")
    pytest.importorskip("scipy", reason="fitting needs SciPy (extra: optimum)")
    table, out = tmp_path / "steps.csv", tmp_path / "own.toml"
    options = ["--device", "cpu", "--shape", "tiny", "--longest", "256", "--batch", "16"]
    options += ["--kv-tokens", "1000", "--steps", str(table), "--out", str(out)]
    found = CliRunner().invoke(complete(), ["calibrate", *options, *["--quick"] * quick])
    assert found.exit_code == 0, found.output
    assert len(read_steps(table)) == len(grid(256, 16, quick=quick))
    profile = load_profile(out)
    assert (profile.model, profile.gpu) == ("tiny", "CPU")
    assert profile.step(256, 256 * 128, 0, 0) > 0 and profile.step(1, 0, 10, 1) > 0
    assert profile.fit_error is not None


def test_a_table_or_a_device() -> None:
    found = CliRunner().invoke(complete(), ["calibrate", "--kv-tokens", "5"])
    assert isinstance(found.exception, ValueError) and "TABLE" in str(found.exception)
