"""The engine model beside a real vLLM run, and what is said of a log that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvist.cli import app, fidelity
from kvist.engine.measured import read_log
from kvist.sim.base import SimConfig
from kvist.sim.fidelity import compare, read_prompts, replay

TRACES = Path(__file__).parents[2] / "shared" / "traces"
LOG = TRACES / "vllm_groundtruth_llama31-8b_RTX4090.jsonl"
REQUESTS = TRACES / "sharegpt_llama31_tokids_300.jsonl.gz"
ROW = '{"input_toks": 3, "output_toks": 2, "queued_ts": 1.0, "first_token_ts": 1.5, "last_token_ts": 1.6}\n'
ENGINE = SimConfig(
    router="round_robin", eviction="l-lru", workers=1, profile="llama-3.1-8b-rtx4090", block_size=16
)


@pytest.mark.skipif(not LOG.exists(), reason="the measured run is not there (../shared/traces)")
def test_within_a_tenth_of_the_real_engine() -> None:
    log = read_log(LOG)
    figures = compare(log, replay(log, read_prompts(REQUESTS, log), ENGINE))
    assert [figure.name for figure in figures] == [
        "mean TTFT", "p90 TTFT", "mean TPOT", "p90 TPOT", "mean latency", "p90 latency",
    ]  # fmt: skip
    for figure in figures:
        assert abs(figure.error) < 0.1, figure


def test_an_uncontended_request_takes_the_profile_s_time(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(ROW)
    log = read_log(tmp_path / "log")
    figures = compare(log, replay(log, None, ENGINE))
    step_ms = 2.353182 + 15.617997
    assert figures[0].model == pytest.approx(step_ms * 1e-3, rel=1e-3)
    assert figures[0].real == pytest.approx(0.5) and figures[2].real == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        ("{nonsense\n", ":1: not JSON"),
        (ROW + ROW.replace("input_toks", "inputs"), ":2: field 'input_toks'"),
        (ROW.replace("1.5", '"soon"'), "first_token_ts"),
        (ROW.replace("1.5", "0.5"), "in this order"),
    ],
)
def test_a_bad_log_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_log(file)
    assert "log.jsonl" in str(caught.value)


def test_requests_that_are_not_the_log_s(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(ROW)
    log = read_log(tmp_path / "log")
    requests = tmp_path / "requests"
    for text, said in (
        ('{"input_tok_ids": [1, 2]}\n', "2 token ids"),
        ('{"input_tok_ids": [1, 2, -3]}\n', "token ids from 0"),
        ('{"input_tok_ids": [1, 2, 3]}\n' * 2, "2 requests"),
    ):
        requests.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_prompts(requests, log)
    with pytest.raises(ValueError, match="KV capacity"):
        compare(log, replay(log, None, SimConfig(router="round_robin", workers=1, kv_tokens=2)))


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(ROW)
    if not any(command.callback is fidelity.fidelity for command in app.registered_commands):
        fidelity.register(app)
    found = CliRunner().invoke(app, ["fidelity", str(tmp_path / "log")])
    assert found.exit_code == 0, found.output
    assert "mean TTFT" in found.output and "p90 latency" in found.output
