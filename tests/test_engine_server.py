"""The embedded engine as a process: API, metrics, speed, limits, a graceful stop, and any bytes at all."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from gateway_processes import SECONDS, Process, call, chat, engine, metric, wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gateway_fuzz import bodies, statuses

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    one = engine("--kv-tokens=4096", "--max-waiting=4", "--max-num-seqs=2")
    yield one
    one.stop()


def events(text: bytes) -> list[dict[str, object]]:
    lines = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_it_says_at_start_up_and_in_answers_that_it_is_a_model(process: Process) -> None:
    assert "a model of" in process.lines[0] and "the text is filler" in process.lines[0]
    for path, body in ((CHAT, chat()), ("/generate", {"text": "x"}), ("/health", None), ("/nowhere", {})):
        assert "a model of an engine" in call(process.url, path, body)[2]["server"]
    answer = json.loads(call(process.url, CHAT, chat(max_tokens=12))[1])
    assert answer["choices"][0]["message"]["content"] == "kvist models an engine, so this text is filler. "


def test_usage_comes_in_streams_only_when_asked_for(process: Process) -> None:
    prompt = "a prompt of some length " * 40
    plain = events(call(process.url, CHAT, chat(prompt, stream=True, max_tokens=3))[1])
    assert len(plain) == 3 and not any("usage" in event for event in plain)
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    counted = events(call(process.url, CHAT, chat(prompt, **options))[1])
    usage = counted[-1]["usage"]
    assert len(counted) == 4 and counted[-1]["choices"] == [] and isinstance(usage, dict)
    assert usage["prompt_tokens"] > 240 and usage["completion_tokens"] == 3
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached % 16 == 0 and usage["prompt_tokens"] - 16 <= cached < usage["prompt_tokens"]
    text = {"prompt": prompt, **options}
    assert events(call(process.url, "/v1/completions", text)[1])[-1]["usage"]


def test_metrics_have_vllms_names_and_a_flush_empties_the_cache(process: Process) -> None:
    call(process.url, "/flush_cache", method="POST")
    before = {
        name: metric(process.url, f"vllm:{name}")
        for name in ("prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total")
    }
    body = chat("the same prompt, twice " * 40, max_tokens=2)
    used = [json.loads(call(process.url, CHAT, body)[1])["usage"] for _ in range(2)]
    cached = used[1]["prompt_tokens_details"]["cached_tokens"]
    assert used[0]["prompt_tokens_details"]["cached_tokens"] == 0 < cached
    after = {name: metric(process.url, f"vllm:{name}") for name in before}
    assert after["prefix_cache_queries_total"] - before["prefix_cache_queries_total"] == sum(
        use["prompt_tokens"] for use in used
    )
    assert after["prefix_cache_hits_total"] - before["prefix_cache_hits_total"] == cached
    assert after["request_success_total"] - before["request_success_total"] == 2
    exposed = call(process.url, "/metrics")[1].decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{model_name="tiny"}} 0' in exposed, "nothing is under way"
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="256"} 1' in exposed
    assert call(process.url, "/flush_cache", method="POST")[0] == 200
    again = json.loads(call(process.url, CHAT, body)[1])["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 0


def test_beyond_its_queue_it_refuses_and_a_busy_cache_is_not_flushed(process: Process) -> None:
    found: list[tuple[int, dict[str, str]]] = []

    def ask(i: int) -> None:
        status, _, headers = call(process.url, CHAT, chat(f"{i}", max_tokens=1500))
        found.append((status, headers))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    wait_for(lambda: metric(process.url, "vllm:num_requests_running") == 2)
    assert call(process.url, "/flush_cache", method="POST")[0] == 409
    for thread in threads:
        thread.join()
    refused = [headers for status, headers in found if status == 503]
    assert refused and all(int(headers["retry-after"]) >= 1 for headers in refused)
    assert sum(status == 200 for status, _ in found) == 12 - len(refused) >= 6
    wait_for(lambda: metric(process.url, "vllm:num_requests_running") == 0)


def test_what_does_not_fit_is_named(process: Process) -> None:
    for path, body, words in (
        (CHAT, {}, "messages"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(n=2), "n: this engine gives one answer"),
        (CHAT, {"messages": [{"content": "x"}]}, "role"),
        (CHAT, chat("x" * 40_000), "KV cache"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/responses", {"input": [1]}, "input"),
        ("/v1/embeddings", {}, "input"),
    ):
        status, data, _ = call(process.url, path, body)
        assert status == 400 and words in json.loads(data)["error"]["message"], (path, body)


def test_the_speed_up_shortens_waiting_not_the_modelled_times() -> None:
    spent, modelled = [], []
    for speed in (1, 4):
        one = Process("-m", "kvist", "engine", "--port=0", f"--speed={speed}", "--model=tiny")
        try:
            start = time.monotonic()
            assert call(one.url, CHAT, chat("x" * 8000, max_tokens=200))[0] == 200
            spent.append(time.monotonic() - start)
            modelled.append(metric(one.url, "vllm:e2e_request_latency_seconds_sum"))
        finally:
            one.stop()
    assert spent[0] >= modelled[0] * 0.95, "at speed 1 a modelled second takes a second"
    assert spent[1] < spent[0] / 2 and modelled[1] == pytest.approx(modelled[0], rel=0.5)


def test_sigterm_lets_requests_end_and_a_second_signal_does_not() -> None:
    for signals, tokens, status in ((1, 1500, "whole"), (2, 20_000, "cut")):
        one = engine()
        found: list[object] = []

        def ask(url: str = one.url, tokens: int = tokens, found: list[object] = found) -> None:
            try:
                found.append(call(url, CHAT, chat("long", max_tokens=tokens))[0])
            except OSError:
                found.append("cut")

        def refuses(url: str = one.url) -> bool:
            try:
                call(url, "/health")
            except OSError:
                return True
            return False

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda url=one.url: metric(url, "vllm:num_requests_running") == 1)
        for _ in range(signals):
            one.signal(signal.SIGTERM)
            wait_for(refuses)
        thread.join()
        assert found == [200 if status == "whole" else "cut"]
        assert one.process.wait(SECONDS) == 0


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(
        b"/v1/chat/completions /v1/completions /v1/responses /v1/embeddings /generate /tokenize".split()
    ),
    body=bodies,
)
def test_any_body(process: Process, path: bytes, body: bytes) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % (
        path,
        len(body),
    )
    found = statuses(process.url, head + body)
    assert len(found) <= 1 and all(status < 500 for status in found), (found, body)


def test_afterwards_nothing_is_left(process: Process) -> None:
    wait_for(lambda: metric(process.url, "vllm:num_requests_running") == 0)
    assert call(process.url, "/flush_cache", method="POST")[0] == 200, "no lock is left"
    assert not [line for line in process.lines if "Traceback" in line]
