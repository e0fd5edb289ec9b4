"""`kvist launch` with a stand-in for the engine: real processes, signals and restarts, a real gateway."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateway_processes import call, chat, free_port, metric, wait_for

from kvist.cli import main
from kvist.launch import machine
from kvist.launch.plan import Wanted, make_plan, share_gpus

FAKE = f"{sys.executable} {Path(__file__).with_name('fake_engine.py')}"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Launch:
    def __init__(
        self,
        *options: str,
        mode: str = "",
        model: str = "tiny",
        command: str = FAKE,
        tokenizer: str = "embedded",
    ) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        words = ["launch", f"--model={model}", f"--port={port}", "--worker-port=0"]
        words += [f"--engine-command={command}", f"--tokenizer={tokenizer}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvist", *words, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "FAKE_ENGINE": mode, "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in self.process.stdout)

    def said(self, pattern: str) -> list[str]:
        return [
            found[1] if found.groups() else found[0]
            for line in self.lines
            if (found := re.search(pattern, line))
        ]

    def wait(self, pattern: str, times: int = 1) -> list[str]:
        wait_for(lambda: len(self.said(pattern)) >= times or self.process.poll() is not None)
        found = self.said(pattern)
        assert len(found) >= times, "\n".join(self.lines)
        return found

    def pids(self) -> list[int]:
        """Everything that was ever started."""
        return [int(pid) for pid in self.said(r"started, process (\d+)") + self.said(r"helper (\d+)")]

    def ended(self) -> int:
        code = self.process.wait(120)
        self._reader.join(60)
        return code


@contextmanager
def launched(*options: str, mode: str = "") -> Iterator[Launch]:
    launch = Launch(*options, mode=mode)
    try:
        yield launch
    finally:
        for pid in launch.pids():
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        launch.process.kill()
        launch.process.wait()


def test_engines_start_answer_restart_and_stop() -> None:
    with launched("--replicas=2", "--eviction=rlt", "--", "--block-size=32") as launch:
        launch.wait(r"\[launch\] ready at")
        assert launch.said(r"\[vllm-1\] helper \d+, eviction rlt")
        urls = launch.said(r"\[vllm-\d\] healthy at (\S+)")
        text = "the same words again and again " * 40
        for _ in range(3):
            assert call(launch.url, "/v1/chat/completions", chat(text, model="tiny"))[0] == 200

        def workers() -> list[dict[str, str]]:
            return list(json.loads(call(launch.url, "/workers")[1])["workers"])

        assert sorted(worker["id"] for worker in workers()) == sorted(urls)
        wait_for(lambda: "exact" in {worker["knows"] for worker in workers()})  # KV events arrive
        assert metric(launch.url, "kvist_cached_true_total") > 0

        victim, helper = (
            int(launch.said(r"\[vllm-0\] started, process (\d+)")[0]),
            int(launch.said(r"\[vllm-0\] helper (\d+)")[0]),
        )
        os.kill(victim, signal.SIGKILL)
        launch.wait(r"\[vllm-0\] was killed by SIGKILL: starting it again in 1 s")
        wait_for(lambda: not alive(helper))
        for i in range(5):
            assert call(launch.url, "/v1/chat/completions", chat(f"{i}", model="tiny"))[0] == 200
        launch.wait(r"\[vllm-0\] healthy at", times=2)
        gateway = int(launch.said(r"\[gateway\] started, process (\d+)")[0])
        os.kill(gateway, signal.SIGKILL)
        launch.wait(r"\[gateway\] healthy at", times=2)
        assert call(launch.url, "/v1/chat/completions", chat(text, model="tiny"))[0] == 200

        launch.process.send_signal(signal.SIGINT)
        assert launch.ended() == 0
        assert len(launch.pids()) == 8 and not any(alive(pid) for pid in launch.pids()), launch.lines


def test_what_ignores_sigterm_is_killed_after_the_grace() -> None:
    with launched("--grace=1", mode="stubborn") as launch:
        launch.wait(r"helper \d+")
        start = time.monotonic()
        launch.process.send_signal(signal.SIGTERM)
        assert launch.ended() == 0
        assert time.monotonic() - start > 0.9
        assert not any(alive(pid) for pid in launch.pids())


def test_a_second_signal_kills_at_once() -> None:
    with launched("--grace=3000", mode="stubborn") as launch:
        launch.wait(r"helper \d+")
        launch.process.send_signal(signal.SIGINT)
        launch.wait(r"\[launch\] stopping")
        launch.process.send_signal(signal.SIGINT)
        assert launch.ended() == 0
        assert not any(alive(pid) for pid in launch.pids())


@pytest.mark.skipif(sys.platform != "linux", reason="the tether to the parent is Linux's")
def test_a_killed_launcher_leaves_no_engine_behind() -> None:
    with launched() as launch:
        launch.wait(r"\[launch\] ready at")
        started = [int(pid) for pid in launch.said(r"started, process (\d+)")]
        launch.process.kill()
        wait_for(lambda: not any(alive(pid) for pid in started))


def test_an_engine_that_does_not_understand_its_options_ends_the_launch() -> None:
    with launched("--replicas=2", "--", "--no-such-option") as launch:
        assert launch.ended() == 1
        last = launch.lines[-1]
        assert last.startswith("kvist: vllm-") and "unrecognized arguments: --no-such-option" in last
        assert not any(alive(pid) for pid in launch.pids())


def wanted(**more: object) -> Wanted:
    defaults: dict[str, object] = {
        "engine": "vllm",
        "model": "/models/llama",
        "replicas": 2,
        "events": Path("/run/k"),
        "worker_ports": [8001, 8002],
        "engine_command": ["vllm"],
    }
    return Wanted(**{**defaults, **more})  # type: ignore[arg-type]


def test_command_lines_of_vllm_and_of_the_gateway() -> None:
    plan = make_plan(
        wanted(eviction="rlt", tokenizer="/models/llama", gpus=list("0123"), tensor_parallel_size=2, seed=7,
               extra=["--max-model-len", "4096"]),
        {"VLLM_PLUGINS": "other"},
    )  # fmt: skip
    second = plan.engines[1]
    assert second.argv[:3] == ["vllm", "serve", "/models/llama"]
    assert second.argv[-2:] == ["--max-model-len", "4096"]
    events = json.loads(second.argv[second.argv.index("--kv-events-config") + 1])
    assert events == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "topic": "kv-events",
        "endpoint": "ipc:///run/k/1.events",
        "replay_endpoint": "ipc:///run/k/1.replay",
    }
    assert second.argv[second.argv.index("--tensor-parallel-size") + 1] == "2"
    assert second.environ == {
        "KVIST_EVICTION": "rlt",
        "KVIST_EVICTION_SEED": "8",
        "VLLM_PLUGINS": "other,kvist",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    serve = plan.gateway.argv
    assert [serve[i + 1] for i, word in enumerate(serve) if word == "--worker-urls"] == [
        "http://127.0.0.1:8001",
        "http://127.0.0.1:8002",
    ]
    assert [serve[i + 1] for i, word in enumerate(serve) if word == "--kv-events"] == [
        "ipc:///run/k/0.events",
        "ipc:///run/k/1.events",
    ]


def test_without_options_nothing_of_the_engine_is_changed() -> None:
    plan = make_plan(wanted(), {"VLLM_PLUGINS": "other"})
    assert plan.engines[0].environ == {} and "--kv-events" not in plan.gateway.argv


def test_command_line_of_sglang() -> None:
    plan = make_plan(wanted(engine="sglang", engine_command=["sg"], tensor_parallel_size=4), {})
    words = plan.engines[0].argv
    assert words[:3] == ["sg", "--model-path", "/models/llama"]
    assert words[words.index("--tp-size") + 1] == "4"
    assert "enable_kv_cache_events" not in json.loads(words[words.index("--kv-events-config") + 1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "trt"}, "--engine trt: choose one of vllm, sglang"),
        ({"extra": ["--port=3"]}, "--port behind -- is not yours to give: give --worker-port"),
        ({"gpus": ["0"]}, "needs 2 GPUs, and there are 1 (0): lower"),
        ({"eviction": "belady"}, "--eviction belady: choose one of"),
        ({"engine": "vllm", "engine_command": []}, "vllm is not installed beside kvist"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: dict[str, object], words: str) -> None:
    if "not installed" in words and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    with pytest.raises(ValueError, match=re.escape(words)):
        make_plan(wanted(**options), {})


def test_gpus_are_shared_out_in_order() -> None:
    assert share_gpus(["3", "1", "GPU-a"], 3, 1) == ["3", "1", "GPU-a"]
    assert share_gpus([], 3, 8) == []
    assert machine.visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ["2", "5"]
    assert machine.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_taken_port_is_named() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--worker-port {port}: 127.0.0.1:{port}: .* choose another"):
            machine.take_ports("127.0.0.1", port, 1)
    assert len(set(machine.take_ports("127.0.0.1", 0, 3))) == 3


def test_the_tokenizer_is_found_beside_the_model(tmp_path: Path) -> None:
    assert machine.tokenizer_folder(str(tmp_path)) == ""
    (tmp_path / "tokenizer.json").write_text("{}")
    assert machine.tokenizer_folder(str(tmp_path)) == str(tmp_path)


def test_a_wrong_policy_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["launch", "--model=x", "--policy=best", f"--engine-command={FAKE}"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
