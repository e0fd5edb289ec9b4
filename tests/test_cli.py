"""The command line as a user meets it: results, options from three places, and one line for bad input."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.cache import EVICTIONS
from kvist.cli import COMMANDS, main, spread
from kvist.cli.cache import parse_size
from kvist.routing import ROUTERS

SMALL = ["--workload", "gsp:groups=3,prompts=4,lengths=64/128"]


class Ran:
    """Exit code and output of one run of kvist in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def kvist(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*argv: str) -> Ran:
        with pytest.raises(SystemExit) as stop:
            main(list(argv))
        captured = capsys.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_policies_lists_every_policy(kvist) -> None:  # type: ignore[no-untyped-def]
    rows = json.loads(kvist("policies", "--json").out)
    names = {(row["kind"], row["name"]) for row in rows}
    assert names >= {("routing", name) for name in ROUTERS} | {("eviction", name) for name in EVICTIONS}
    assert all(row["description"] and row["source"] for row in rows)
    assert "lbgr" in kvist("policies").out


def test_every_command_file_is_a_command(kvist) -> None:  # type: ignore[no-untyped-def]
    files = Path(str(importlib.import_module("kvist.cli").__file__)).parent.glob("*.py")
    assert {f.stem for f in files if "def register(" in f.read_text()} == set(COMMANDS)
    shown = kvist("--help").out
    assert all(f" {name} " in shown for name in COMMANDS)


def test_bench_json_and_table(kvist) -> None:  # type: ignore[no-untyped-def]
    argv = ["bench", *SMALL, "--routers", "lbgr", "random", "--evictions", "rlt", "--rates", "20", "40"]
    rows = json.loads(kvist(*argv, "--json").out)
    assert [(row["rate"], row["router"]) for row in rows] == [
        (20.0, "lbgr"),
        (20.0, "random"),
        (40.0, "lbgr"),
        (40.0, "random"),
    ]
    assert rows[0]["seeds"][0]["completed"] == 12
    table = kvist(*argv)
    assert table.code == 0
    assert "Answers soonest" in table.out
    assert table.err == ""  # no progress bar in a pipe


def test_seed_repeats_a_run(kvist) -> None:  # type: ignore[no-untyped-def]
    argv = ["bench", *SMALL, "--routers", "random", "--evictions", "rlt", "--json", "--seed"]
    assert kvist(*argv, "7").out == kvist(*argv, "7").out
    assert kvist(*argv, "7").out != kvist(*argv, "8").out


def test_bench_out(kvist, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    ran = kvist("bench", *SMALL, "--routers", "random", "--evictions", "rlt", "--out", str(out))
    assert ran.code == 0
    assert {"results.csv", "results.json", "report.html"} <= {path.name for path in out.iterdir()}


def test_cache_sizes_and_ceiling(kvist) -> None:  # type: ignore[no-untyped-def]
    points = json.loads(kvist("cache", SMALL[1], "--sizes", "10%", "100%", "--json").out)
    at = {(point["policy"], point["size"]): point["hit_rate"] for point in points}
    sizes = sorted({size for _, size in at})
    assert all(at["belady", size] >= at[name, size] for name in ("l-lru", "rlt", "l-lfu") for size in sizes)
    assert "offline" not in kvist("cache", SMALL[1], "--policies", "rlt", "--sizes", "500").out


def test_cache_of_a_trace_file(kvist, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    row = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 2)
    points = json.loads(kvist("cache", str(path), "--policies", "rlt", "--sizes", "1k", "--json").out)
    assert points == [{"policy": "rlt", "size": 1000, "hit_rate": 0.5, "ci": 0.0}]


def test_theory_prints_the_fits(kvist) -> None:  # type: ignore[no-untyped-def]
    ran = kvist("theory", "--sizes", "10,40,160", "--seeds", "4")
    assert "l-lru grows like n: ratio = 1 n +1.00, R2 1.0000" in ran.out
    assert "rlt grows like ln n" in ran.out


def test_optimum_is_between_bound_and_policies(kvist) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(kvist("optimum", "--queries", "8", "--json").out)
    assert found["lower_bound"] <= found["optimum"] * (1 + 1e-6)
    assert min(found["makespans"].values()) >= found["optimum"] * (1 - 1e-6)


def routers(ran: Ran) -> list[str]:
    assert ran.err == ""
    return [row["router"] for row in json.loads(ran.out)]


def test_options_from_file_environment_and_command_line(  # type: ignore[no-untyped-def]
    kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "kvist.toml"
    config.write_text(
        'evictions = "rlt"\nseed = 4\n[bench]\nrouters = ["least_load"]\nseed = 5\n[theory]\nrounds = 3\n'
    )
    argv = ["bench", *SMALL, "--json", "--config", str(config)]
    from_file = kvist(*argv)
    assert routers(from_file) == ["least_load"]
    assert from_file.out == kvist(*argv, "--seed", "5").out != kvist(*argv, "--seed", "4").out
    monkeypatch.setenv("KVIST_BENCH_ROUTERS", "random")
    assert routers(kvist(*argv)) == ["random"]
    assert routers(kvist(*argv, "--routers", "round_robin")) == ["round_robin"]


BAD = [
    (["bench", "--routers", "best"], "--routers: unknown 'best': choose from lbgr"),
    (["bench", "--evictions", "belady"], "unknown 'belady'"),
    (["bench", "--workers", "-1"], "--workers"),
    (["bench", "--rates", "0"], "--rates: must be above 0"),
    (["bench", "--rates", "fast"], "--rates: 'fast' is not a number"),
    (["bench", "--kv-tokens", "-5"], "--kv-tokens"),
    (["bench", *SMALL, "--kv-tokens", "8", "--block-size", "16"], "at least one block of 16 tokens, not 8"),
    (["bench", "--profile", "abacus"], "unknown latency profile 'abacus'"),
    (["bench", "--order", "odd", *SMALL], "unknown queue order 'odd'"),
    (["bench", "--workload", "gsp:groups=0"], "gsp: groups, prompts and output must be at least 1"),
    (["bench", "--out", "/dev/null/x", *SMALL], "--out /dev/null/x"),
    (["bench", "--config", "gone.toml"], "--config gone.toml: No such file"),
    (["bench", "--colour"], "No such option: --colour"),
    (["cache", "gone.jsonl"], "gone.jsonl: No such file"),
    (["cache", "nothing"], "unknown workload 'nothing'"),
    (["cache", "gsp", "--sizes", "-1"], "--sizes: -1 is below one block"),
    (["cache", "gsp", "--sizes", "big"], "'big' is not a size"),
    (["cache", "gsp", "--policies", "lru"], "--policies: unknown 'lru'"),
    (["theory", "--sizes", "1"], "at least 2 tokens"),
    (["optimum", "--queries", "60", "--workload", "gsp"], "at most 24 queries"),
    (["dance"], "No such command 'dance'"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(kvist, argv: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    ran = kvist(*argv)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("kvist: ")
    assert message in ran.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bench]\nrouterz = 1\n", "unknown option 'routerz'"),
        ("colour = 1\n", "unknown option 'colour'"),
        ("[bench\n", "Expected"),
        ("[bench]\nworkers = 'many'\n", "--workers"),
    ],
)
def test_bad_config(kvist, tmp_path: Path, text: str, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "kvist.toml"
    path.write_text(text)
    ran = kvist("bench", "--config", str(path))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert message in ran.err


def test_bad_trace_line_in_a_process_of_the_pool(kvist, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": []}\n')
    ran = kvist("bench", "--workload", f"trace:{path}", "--routers", "random", "--jobs", "2")
    assert ran.code == 2
    assert f"{path}:1: field 'hash_ids'" in ran.err


def test_a_missing_extra_is_named(kvist, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    ran = kvist("optimum", "--queries", "4")
    assert ran.code == 2
    assert "kvist[optimum]" in ran.err


def test_as_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "from kvist.cli import main; main()", "bench", "--workers", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1


def test_spread_repeats_an_option() -> None:
    many = {"--urls"}
    assert spread(["--urls", "a", "b", "--n", "1"], many) == ["--urls", "a", "--urls", "b", "--n", "1"]
    assert spread(["--sizes", "-5", "3"], {"--sizes"}) == ["--sizes", "-5", "--sizes", "3"]
    assert spread(["--urls", "a", "--", "b"], many) == ["--urls", "a", "--", "b"]


def test_sizes() -> None:
    assert parse_size("200000", 0, 1) == 200_000
    assert parse_size("500k", 0, 1) == 500_000
    assert parse_size("1.5M", 0, 1) == 1_500_000
    assert parse_size("10%", 1000, 1) == 100
    assert parse_size("0.1%", 1000, 16) == 16
