"""What workers say of themselves in /metrics: read, shown, and used."""

from __future__ import annotations

import threading

import pytest
from gateway_processes import call, chat, engine, metric, running, state, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.gateway.knowledge.load import Report, read
from kvist.model import Query, WorkerState
from kvist.routing import make_policy
from kvist.routing.base import Candidate

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.1
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="256"} 1.0
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="1",num_gpu_blocks="256"} 1.0
"""
SGLANG = b"""sglang:num_running_reqs{model_name="m",tp_rank="0"} 4.0
sglang:num_queue_reqs{model_name="m"} 1.0
sglang:token_usage{model_name="m"} 0.25
sglang:max_total_num_tokens{model_name="m"} 51200.0
sglang:num_used_tokens{model_name="m"} 12.0
"""


def test_both_engines_names_are_read() -> None:
    assert read(VLLM) == Report(running=5, waiting=7, kv_usage=pytest.approx(0.3), capacity=16384)
    assert read(SGLANG) == Report(running=4, waiting=1, kv_usage=0.25, capacity=51200)
    assert read(b"vllm:gpu_cache_usage_perc 0.75\n") == Report(kv_usage=0.75)
    odd = b'vllm:cache_config_info{block_size="None"} 1\nvllm:num_requests_running NaN\n'
    assert read(odd) == read(b"") == Report()
    assert Report().requests is None and Report(running=2).requests == 2


@settings(deadline=None)
@given(st.binary())
def test_no_text_breaks_the_reader(text: bytes) -> None:
    read(text)
    read(b"vllm:num_requests_running " + text)


@pytest.mark.parametrize("policy", ["least_load", "power_of_two", "cache_aware"])
def test_rules_that_count_requests_count_those_of_others(policy: str) -> None:
    busy, free = WorkerState("busy", in_flight=1, others=100), WorkerState("free", in_flight=20)
    candidates = [Candidate(busy, 0), Candidate(free, 0)]
    assert make_policy(policy).choose(Query(0, b"1234"), candidates, 0.0).worker == "free"


def test_a_worker_reports_capacity_and_the_load_of_others() -> None:
    engines = [engine("--kv-tokens=4000", "--speed=1"), engine("--kv-tokens=8000", "--speed=1")]
    with running(engines, "--metrics-interval=0.1", "--policy=least_load") as gateway:

        def rows() -> list[dict[str, object]]:
            return state(gateway.url)["workers"]

        wait_for(lambda: [row["capacity"] for row in rows()] == [4000, 8000])
        assert metric(gateway.url, "kvist_worker_capacity", worker=engines[1].url) == 8000
        direct = [
            threading.Thread(
                target=call,
                args=(engines[0].url, "/v1/chat/completions", chat("x", model="tiny", max_tokens=300)),
            )
            for _ in range(3)
        ]
        for thread in direct:
            thread.start()
        wait_for(lambda: rows()[0]["others"] == 3)
        for _ in range(3):
            body = chat("y", model="tiny", max_tokens=1)
            headers = call(gateway.url, "/v1/chat/completions", body, x_kvist_explain="1")[2]
            assert headers["x-kvist-worker"] == engines[1].url, "the other one is busy with others' requests"
        for thread in direct:
            thread.join()
        wait_for(lambda: rows()[0]["others"] == 0)


def test_how_far_the_policys_predictions_hold_is_shown() -> None:
    worker = engine("--speed=10")
    with running([worker], "--policy=lbgr") as gateway:
        for i in range(12):
            call(gateway.url, "/v1/chat/completions", chat(f"{i} " * 300, model="tiny", max_tokens=2))
        told = state(gateway.url)["workers"][0]["predictions"]
        assert told["answers"] == 12 and told["error"] > 0 and told["pace"] > 0
        assert metric(gateway.url, "kvist_worker_prediction_error", worker=worker.url) == told["error"]
        assert metric(gateway.url, "kvist_worker_prediction_drift", worker=worker.url) == told["drift"]
    with running([engine()], "--policy=cache_aware") as gateway:
        assert state(gateway.url)["workers"][0]["predictions"] is None
        assert b"kvist_worker_prediction_drift{" not in call(gateway.url, "/metrics")[1]


def test_without_the_option_nothing_is_read() -> None:
    with running([engine()]) as gateway:
        row = state(gateway.url)["workers"][0]
        assert row["capacity"] is row["running"] is None and row["others"] == 0
