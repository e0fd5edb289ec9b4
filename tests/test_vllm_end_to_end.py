"""Two real vLLM workers under RLT behind the gateway, against a plain vLLM: same answers, known caches.

A tiny Llama with random weights, in float32 so that a token does not depend on which part of its prompt came
from the cache. The KV cache is far smaller than the conversations, so blocks are evicted all the time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gateway_processes import call, metric, wait_for

pytest.importorskip("vllm", reason="vLLM is not installed: make test-engines runs this")

from test_launch import Launch, alive, free_port
from tiny_model import TEXT, build

pytestmark = pytest.mark.timeout(900)

BLOCK, BLOCKS = 32, 96
OPTIONS = ["--max-model-len=1536", "--dtype=float32", "--enforce-eager", "--served-model-name=tiny"]
OPTIONS += [f"--num-gpu-blocks-override={BLOCKS}", f"--block-size={BLOCK}", "--max-num-seqs=4"]
ENVIRON = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
CONVERSATIONS, TURNS = 14, 4
THINK = 0.1  # seconds to the next turn, in which the engine's events are out
WORDS = " ".join(TEXT).split()


JSON = "application/json"


class Said:
    """One answer with what the engine and the gateway said of it."""

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        answer = json.loads(body)
        self.text: str = answer["choices"][0]["message"]["content"]
        self.prompt: int = answer["usage"]["prompt_tokens"]
        self.cached: int = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.worker = headers.get("x-kvist-worker", "")


def ask(url: str, messages: list[dict[str, str]]) -> Said:
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "seed": 0}
    status, answer, headers = call(url, "/v1/chat/completions", body, x_kvist_explain="1", content_type=JSON)
    assert status == 200, answer
    return Said(answer, headers)


def opening(number: int) -> list[dict[str, str]]:
    """A system prompt shared by half of the conversations, and a long first question."""
    rng = Random(number)
    system = " ".join(Random(1000 + number % 2).choices(WORDS, k=60))
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": " ".join(rng.choices(WORDS, k=60 + 20 * (number % 4)))},
    ]


def converse(url: str, number: int, think: float = THINK) -> list[Said]:
    messages, answers = opening(number), []
    for turn in range(TURNS):
        said = ask(url, messages)
        answers.append(said)
        time.sleep(think)
        messages.append({"role": "assistant", "content": said.text})
        question = " ".join(Random(100 * number + turn).choices(WORDS, k=25))
        messages.append({"role": "user", "content": question})
    return answers


def everybody(url: str, clients: int, think: float = THINK) -> dict[int, list[Said]]:
    with ThreadPoolExecutor(clients) as pool:
        return dict(
            zip(
                range(CONVERSATIONS),
                pool.map(lambda n: converse(url, n, think), range(CONVERSATIONS)),
                strict=True,
            )
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[int, list[str]]:
    """The answers of a vLLM without the plugin."""
    with running_vllm(model) as url:
        return {number: [said.text for said in answers] for number, answers in everybody(url, 1).items()}


@contextmanager
def running_vllm(model: Path, **environ: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *OPTIONS]
    command += ["--host=127.0.0.1", f"--port={port}", "--enable-prompt-tokens-details"]
    log = model / f"vllm-{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **ENVIRON, **environ}, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: process.poll() is not None or answers(url), 300)
            assert process.poll() is None, log.read_text()[-3000:]
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                if alive(process.pid):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def fleet(model: Path, folder: Path) -> Iterator[Launch]:
    """kvist launch with two workers under RLT; the gateway logs each request."""
    config = folder / "serve.toml"
    config.write_text("log_requests = true\nhealth_check_interval = 1.0\n")
    old = dict(os.environ)
    os.environ.update(ENVIRON)
    try:
        launch = Launch(
            *("--replicas=2", "--eviction=rlt", f"--serve-config={config}", "--", *OPTIONS),
            model=str(model), command="", tokenizer=str(model),
        )  # fmt: skip
    finally:
        os.environ.clear()
        os.environ.update(old)
    try:
        wait_for(lambda: launch.said(r"\[launch\] ready at") or launch.process.poll() is not None, 400)
        assert launch.said(r"\[launch\] ready at"), "\n".join(launch.lines[-40:])
        yield launch
    finally:
        launch.process.send_signal(signal.SIGINT)
        try:
            launch.ended()
        finally:
            launch.process.kill()
        assert not any(alive(pid) for pid in launch.pids())


def logged(launch: Launch) -> list[dict[str, Any]]:
    lines = launch.said(r'^\[gateway\] (\{"event":"request",.*\})$')
    return [json.loads(line) for line in lines]


def agreement(when: str, log: list[dict[str, Any]]) -> int:
    """Requests of which the gateway knew exactly what the engine had cached.

    Never all: what a request finds may be evicted, or cached by another one, while it waits for its turn.
    """
    wrong = [
        (entry["cached"], entry["cached_true"]) for entry in log if entry["cached"] != entry["cached_true"]
    ]
    right = len(log) - len(wrong)
    print(f"\n{when}: the estimate is the engine's count for {right} of {len(log)}; else {wrong}")
    return right


def test_a_fleet_under_rlt_gives_the_same_answers_and_its_caches_are_known(
    model: Path, plain: dict[int, list[str]], tmp_path: Path
) -> None:
    with fleet(model, tmp_path) as launch:
        assert len(launch.said(r"\[vllm-\d\].*kvist: rlt evicts the prefix cache, 95 blocks")) == 2
        answers = everybody(launch.url, 3)
        assert {n: [said.text for said in turns] for n, turns in answers.items()} == plain
        assert len({said.worker for turns in answers.values() for said in turns}) == 2

        # The gateway knew what each engine held: its estimate beside the engine's own count.
        flat = [said for turns in answers.values() for said in turns]
        wait_for(lambda: len(logged(launch)) >= len(flat))
        log = logged(launch)
        assert len(log) == len(flat)
        assert sum(said.cached for said in flat) == sum(entry["cached_true"] for entry in log)
        agreed = agreement("before the kill", log)
        assert agreed >= 0.95 * len(log)
        hit = sum(entry["cached_true"] for entry in log)
        print(f"{hit} cached tokens in all")
        assert hit > 1000
        assert metric(launch.url, "kvist_tokenized_prompts_total", agrees="false") == 0
        evicted = launch.said(r"kvist: (rlt evicted \d+ blocks so far in \d+ phases)")
        print(f"evictions: {evicted}")
        assert evicted, "RLT evictions show in the engine's log"

        # A worker is killed in the middle of traffic; nobody notices, and it comes back.
        victim = int(launch.said(r"\[vllm-0\] started, process (\d+)")[0])
        with ThreadPoolExecutor(3) as pool:
            later = [pool.submit(converse, launch.url, number) for number in range(CONVERSATIONS)]
            os.kill(victim, signal.SIGKILL)
            again = {number: [said.text for said in turn.result()] for number, turn in enumerate(later)}
        assert again == plain
        launch.wait(r"\[vllm-0\] was killed by SIGKILL")
        wait_for(lambda: len(launch.said(r"\[vllm-0\] healthy at")) == 2, 300)
        back = launch.said(r"\[vllm-0\] healthy at (\S+)")[0]
        wait_for(lambda: metric(launch.url, "kvist_worker_healthy", worker=back) == 1, 60)
        before = len(logged(launch))
        third = everybody(launch.url, 3)
        assert {n: [said.text for said in turns] for n, turns in third.items()} == plain
        wait_for(lambda: len(logged(launch)) >= before + len(flat))
        later_log = logged(launch)[before:]
        agreed += agreement("after the restart", later_log)
        assert agreed >= 0.95 * (len(log) + len(later_log))

        # Next turns that overtake the engine's events: what these will say counts beforehand, a block of it
        # in vain where the answer's text comes back as other tokens (these are random bytes).
        before = len(logged(launch))
        hurried = everybody(launch.url, 3, think=0)
        assert {n: [said.text for said in turns] for n, turns in hurried.items()} == plain
        wait_for(lambda: len(logged(launch)) >= before + len(flat))
        assert agreement("without a pause", logged(launch)[before:]) >= 0.9 * len(flat)
        evicted = launch.said(r"kvist: (rlt evicted \d+ blocks so far in \d+ phases)")
        print(f"evictions: {evicted}")
        assert call(launch.url, "/policy", {"policy": "round_robin"})[0] == 200
        fresh = [ask(launch.url, opening(0)) for _ in range(4)]
        assert back in {said.worker for said in fresh}, "it serves again"
        assert {said.text for said in fresh} == {plain[0][0]}


def test_an_unknown_policy_stops_vllm_with_its_name(model: Path) -> None:
    words = "KVIST_EVICTION=best: unknown policy 'best': choose one of l-lru"
    with pytest.raises(AssertionError, match=words), running_vllm(model, KVIST_EVICTION="best"):
        pass
