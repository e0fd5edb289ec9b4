"""The standard suite: shares of the gap, and the page."""

import json
from pathlib import Path

import pytest

from kvist.cachebench import working_set
from kvist.cli import main
from kvist.report.suite import body, suite_table, write
from kvist.suite import GENERATED, in_design, run, workloads
from kvist.workloads import make_workload

SPECS = ["gsp:groups=8,prompts=8,lengths=64/256", "sharegpt:clients=6,message=32"]


def test_shares_are_what_they_say() -> None:
    outcome = run(SPECS, ["rlt", "fifo"], percent=(10.0, 100.0), seeds=2)
    assert list(outcome.closed) == ["l-lru", "rlt", "fifo", "belady"]
    assert outcome.closed["l-lru"] == 0.0
    assert outcome.closed["belady"] == pytest.approx(1.0)
    assert len(outcome.lines) == 4
    assert outcome.counted <= 2  # at 100 % nothing has to go
    for line in outcome.lines:
        assert line.hit_rates["belady"] >= max(line.hit_rates.values()) - 1e-9
        if line.percent == 100.0:
            assert max(line.hit_rates.values()) == pytest.approx(min(line.hit_rates.values()))
    best = max(outcome.lines[0].hit_rates[name] for name in ("l-lru", "rlt", "fifo"))
    assert outcome.worst["rlt"] >= best - outcome.lines[0].hit_rates["rlt"] - 1e-12


def test_the_same_in_several_processes() -> None:
    assert run(SPECS, ["rlt"], percent=(5.0,), jobs=2) == run(SPECS, ["rlt"], percent=(5.0,))


def test_table_and_files(tmp_path: Path) -> None:
    outcome = run(SPECS, ["rlt"], percent=(5.0,), seeds=2)
    assert suite_table(outcome, 80).row_count == len(body(outcome)) == 2 + 2 * 2
    write(outcome, tmp_path)
    assert len((tmp_path / "suite.csv").read_text().splitlines()) == 1 + 2 * 3
    assert json.loads((tmp_path / "suite.json").read_text())["closed"]["belady"] == pytest.approx(1.0)
    assert "Gap closed" in (tmp_path / "report.html").read_text()


def test_narrow_terminals_get_the_adaptive_policy_beside_the_best() -> None:
    outcome = run(SPECS, ["rlt", "hedge", "fifo"], percent=(5.0,))
    wide, narrow = suite_table(outcome, 200), suite_table(outcome, 50)
    assert [column.header for column in wide.columns][2:] == ["l-lru", "rlt", "hedge", "fifo", "optimum"]
    assert [column.header for column in narrow.columns][2:4] == ["l-lru", "hedge"]
    assert narrow.row_count == 2 + 2
    line = outcome.lines[0]
    rivals = {name: rate for name, rate in line.hit_rates.items() if name not in ("hedge", "belady")}
    best = max(rivals, key=rivals.__getitem__)
    cells = [next(iter(column.cells)) for column in narrow.columns]
    assert cells[4:6] == [f"{100 * rivals[best]:.1f}", best]
    assert cells[6] == f"{100 * (line.hit_rates['hedge'] - rivals[best]):+.1f}"


def test_traces_are_taken_where_they_are(tmp_path: Path) -> None:
    assert workloads(tmp_path / "gone") == workloads(None) == list(GENERATED)
    (tmp_path / "mooncake_conversation.jsonl").write_text("{}")
    trace = f"trace:{tmp_path}/mooncake_conversation.jsonl"
    assert workloads(tmp_path)[-2:] == [f"{trace}:limit=4000", f"{trace}:skip=4000,limit=4000"]


def test_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--suite", "grand"])
    assert stop.value.code == 2
    assert "--suite: unknown 'grand'" in capsys.readouterr().err


def test_held_out_workloads_are_reported_apart() -> None:
    assert in_design("gsp") and in_design("trace:/x/mooncake_conversation.jsonl:limit=4000")
    assert not in_design("trace:/x/mooncake_conversation.jsonl:skip=4000,limit=4000")
    assert not in_design("gsp:order=grouped") and not in_design(
        "trace:/x/tau_airline_gpt4o_messages.jsonl.gz"
    )
    outcome = run(["scan:requests=300"], ["rlt"], percent=(30.0,))
    assert outcome.design is None
    assert outcome.held_out is not None and outcome.held_out.closed == outcome.closed
    assert [row[0][0] for row in body(outcome)][-2:] == ["held out: gap closed", "held out: worst loss"]


@pytest.mark.parametrize("name", ["chats", "rag", "rag:picks=1,drift=0", "agents", "tenants", "scan"])
def test_generated_families(name: str) -> None:
    spec = f"{name}{',' if ':' in name else ':'}requests=600"
    queries, again = list(make_workload(spec, seed=3)), list(make_workload(spec, seed=3))
    assert [q.prompt for q in queries] == [q.prompt for q in again]
    assert len(queries) == 600
    _, hit_rate = working_set(spec, None, 3, 16)
    assert 0.2 < hit_rate < 0.95
