"""What the gateway promises of models, adapters, salts, keys, limits, priorities and counts, end to end."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from gateway_processes import (
    SECONDS,
    Process,
    at_rest,
    call,
    chat,
    engine,
    fake,
    metric,
    running,
    state,
    wait_for,
)
from test_gateway_tracing import Sink

CHAT = "/v1/chat/completions"


def answer(prompt: int, cached: int | None, **more: Any) -> bytes:
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": prompt, "completion_tokens": 2, "prompt_tokens_details": details}
    text = '"cached_tokens": 77777, "prompt_tokens": 1'  # what a model may say itself
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage, **more}).encode()


class Worker(Sink):
    """Answers with what `say` was last set to, once `go` is set; announces models."""

    def __init__(self, say: bytes = b"{}", models: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.say = say
        self.go = threading.Event()
        self.go.set()
        self.models = json.dumps({"data": models or []}).encode()
        worker = self
        handler: Any = self.server.RequestHandlerClass

        def do_post(self: Any) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.command == "POST":
                worker.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                worker.go.wait(SECONDS)
            out = worker.models if self.path == "/v1/models" else worker.say
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        handler.do_POST = do_post


def started(*options: str) -> Process:
    gateway = Process("-m", "kvist", "serve", "--port=0", *options)
    wait_for(lambda: call(gateway.url, "/health")[0] == 200)
    return gateway


def last(gateway: Process) -> dict[str, Any]:
    return state(gateway.url)["recent"][-1]


def test_cached_counts_come_from_usage_alone_and_are_scaled_to_the_prompt() -> None:
    worker = Worker(answer(1000, 500))
    gateway = started(f"--worker-urls={worker.url}")
    try:
        call(gateway.url, CHAT, chat("x" * 4000))
        entry = last(gateway)
        assert entry["cached_true"] == pytest.approx(entry["prompt"] / 2, abs=1)
        worker.say = answer(1000, None)
        call(gateway.url, CHAT, chat("x" * 4000))
        assert last(gateway)["cached_true"] == 0, "it counts, so nothing said is nothing cached"
        assert metric(gateway.url, "kvist_cached_true_total") == 500
        assert metric(gateway.url, "kvist_prompt_true_total") == 2000
    finally:
        gateway.stop()
        worker.stop()


def test_a_worker_that_never_counts_teaches_nothing() -> None:
    worker = Worker(answer(1000, None))
    gateway = started(f"--worker-urls={worker.url}")
    try:
        for _ in range(2):
            call(gateway.url, CHAT, chat("x" * 4000))
        assert last(gateway)["cached_true"] is None and last(gateway)["cached"] > 3000
    finally:
        gateway.stop()
        worker.stop()


def test_a_prompt_that_lost_its_cache_is_unlearned_beyond_a_block() -> None:
    """In text and in tokens: a longer conversation was expected, and the engine holds none of it."""
    for options in ((), ("--tokenizer=embedded",)):
        worker = engine("--model=tiny")
        gateway = started(f"--worker-urls={worker.url}", *options)
        try:
            base = "y" * 8000
            for text in (base, base + "z" * 2000):
                call(gateway.url, CHAT, chat(text, max_tokens=1))
            assert last(gateway)["cached"] > 0
            call(worker.url, "/flush_cache", b"")
            call(
                gateway.url,
                CHAT,
                chat(base, max_tokens=1, stream=True, stream_options={"include_usage": True}),
            )
            entry = last(gateway)
            assert entry["cached_true"] == 0 and entry["cached"] > 0.9 * entry["prompt"]
            call(gateway.url, CHAT, chat(base + "z" * 2000, max_tokens=1))
            entry = last(gateway)
            assert entry["cached"] < 0.85 * entry["prompt"], "what branched off is not expected any more"
        finally:
            gateway.stop()
            worker.stop()


def test_streams_without_usage_teach_how_long_answers_are() -> None:
    """Most clients ask for no usage; a prediction that left decoding out would be a tenth of the latency."""
    with running([engine()]) as gateway:
        for i in range(40):
            body = chat(f"question {i}", stream=True, max_tokens=40)
            assert call(gateway.url, "/v1/chat/completions", body)[0] == 200
        later = state(gateway.url)["recent"][-20:]
        took, told = (sorted(entry[name] for entry in later) for name in ("latency", "predicted"))
        assert len(later) == 20 and told[10] > 0.4 * took[10]


@pytest.mark.parametrize("options", [(), ("--tokenizer=embedded",)])
def test_adapters_are_models_and_keep_prefixes_apart(options: tuple[str, ...]) -> None:
    models = [{"id": "base"}, {"id": "ada", "parent": "base"}, {"id": "bob", "parent": "base"}]
    adapted, plain = Worker(answer(10, 0), models), Worker(answer(10, 0), [{"id": "base"}])
    gateway = started(f"--worker-urls={plain.url}", f"--worker-urls={adapted.url}", *options)
    try:
        wait_for(lambda: len(json.loads(call(gateway.url, "/v1/models")[1])["data"]) == 3)
        for model in ("ada", "ada", "bob"):
            headers = call(gateway.url, CHAT, chat("w" * 2000, model=model), x_kvist_explain="1")[2]
            assert headers["x-kvist-worker"] == adapted.url, "only this one has it"
        cached = [entry["cached"] > 0 for entry in state(gateway.url)["recent"]]
        assert cached == [False, True, False]
        assert call(gateway.url, CHAT, chat("w", model="eve"))[0] == 404
        assert call(gateway.url, CHAT, chat("w", model="base:late"))[0] == 200, "SGLang's way to name one"
        assert call(gateway.url, CHAT, chat("w", model="base"))[0] == 200
    finally:
        for each in (gateway, adapted, plain):
            each.stop()


def test_salts_of_different_keys_are_different() -> None:
    worker = Worker(b"{}")
    gateway = started(f"--worker-urls={worker.url}", "--api-key=one", "--api-key=two")
    try:
        for key, salt in (("one", "s"), ("one", "s"), ("two", "s"), ("two", None), ("one", None)):
            more = {"cache_salt": salt} if salt else {}
            assert call(gateway.url, CHAT, chat("v" * 2000, **more), authorization=f"Bearer {key}")[0] == 200
        data = json.loads(call(gateway.url, "/dashboard/data", authorization="Bearer one")[1])
        assert [entry["cached"] > 0 for entry in data["recent"]] == [False, True, False, False, True]
        assert "authorization" not in worker.requests[0][0], "the client's key is not the worker's"
    finally:
        gateway.stop()
        worker.stop()


def test_rate_limits_are_those_of_each_key() -> None:
    with running(
        [fake()], "--api-key=one", "--api-key=two", "--rate-limit=0.01", "--rate-burst=2"
    ) as gateway:

        def ask(key: str) -> int:
            return call(gateway.url, CHAT, chat(), authorization=f"Bearer {key}")[0]

        assert [ask("one") for _ in range(3)] == [200, 200, 429]
        assert [ask("two") for _ in range(3)] == [200, 200, 429]


def test_the_more_urgent_waits_less() -> None:
    worker = Worker()
    worker.go.clear()
    gateway = started(f"--worker-urls={worker.url}", "--max-concurrent-requests=1")
    try:
        threads = []
        for at, priority in enumerate((0, 1, 5, 3)):
            threads.append(threading.Thread(target=call, args=(gateway.url, CHAT, chat(priority=priority))))
            threads[-1].start()
            wait_for(lambda at=at: (s := state(gateway.url))["active"] + s["queued"] == at + 1)
        worker.go.set()
        for thread in threads:
            thread.join()
        assert [json.loads(body)["priority"] for _, body in worker.requests] == [0, 5, 3, 1]
    finally:
        worker.go.set()
        gateway.stop()
        worker.stop()


def test_headers_and_bodies_are_bounded() -> None:
    with running([fake()], "--max-header-size=2000", "--max-payload-size=3000") as gateway:
        assert call(gateway.url, CHAT, chat(), x_padding="p" * 1000)[0] == 200
        assert call(gateway.url, CHAT, chat(), x_padding="p" * 3000)[0] == 431
        assert call(gateway.url, CHAT, chat("b" * 4000))[0] == 413
        host, port = gateway.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 999999999\r\n\r\n")
            assert b" 413 " in raw.recv(1000), "refused before it is sent"


def test_paths_beyond_the_known_need_leave() -> None:
    with running([fake()], "--allow-path=/v1/rerank") as gateway:
        assert call(gateway.url, "/v1/rerank", {"query": "q"})[0] == 200
        assert call(gateway.url, "/v1/score", {"query": "q"})[0] == 404
        for path in ("/tokenize", "/v1/tokenize"):
            assert call(gateway.url, path, {"prompt": "x"})[0] == 200


def test_policies_are_switched_with_their_parameters_while_requests_run() -> None:
    with running([fake()], "--policy=cache_aware", "--cache-threshold=0.5", "--admin-key=boss") as gateway:

        def switch(body: dict[str, Any], key: str = "boss") -> int:
            return call(gateway.url, "/policy", body, authorization=f"Bearer {key}")[0]

        params = {"cache_threshold": 0.9, "balance_abs_threshold": 3}
        assert switch({"policy": "cache_aware", "params": params}) == 200
        assert switch({"policy": "cache_aware", "params": params}, "stranger") == 401
        for wrong in (
            {"policy": "none"},
            {"policy": "lbgr", "params": {"x": 1}},
            {"policy": "lbgr", "params": 3},
        ):
            assert switch(wrong) == 400, wrong
        assert switch({"policy": "lbgr", "params": {"objective": "ttft"}}) == 200
        assert call(gateway.url, CHAT, chat())[0] == 200
        shown = json.loads(call(gateway.url, "/policy", authorization="Bearer boss")[1])
        assert shown["policy"] == "lbgr" and "cache_aware" in shown["choices"]


def test_sglangs_flags_are_understood() -> None:
    flags = (
        "--policy=cache_aware --cache-threshold=0.4 --balance-abs-threshold=8 --balance-rel-threshold=1.2 "
        "--max-concurrent-requests=64 --queue-size=8 --queue-timeout-secs=5 --request-timeout-secs=20 "
        "--retry-max-retries=1 --cb-failure-threshold=3 --cb-timeout-duration-secs=2 "
        "--health-check-interval-secs=2 --health-check-timeout-secs=1 --health-failure-threshold=2 "
        "--health-success-threshold=1 --health-check-endpoint=/health --max-payload-size=100000"
    )
    with running([fake()], *flags.split()) as gateway:
        assert call(gateway.url, CHAT, chat())[0] == 200
        assert state(gateway.url)["policy"] == "cache_aware"


def test_clients_that_leave_while_a_thread_tokenises_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from test_gateway_tokens import write

    folder = write(tmp_path / "tokenizer")
    with running([fake()], f"--tokenizer={folder}") as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        for i in range(30):
            body = json.dumps(chat(f"{i} " + "many words " * 5000)).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(head + body)
        assert call(gateway.url, CHAT, chat("still here " * 3000))[0] == 200
        wait_for(lambda: metric(gateway.url, "kvist_tokenizer_in_threads_total") >= 30)
        wait_for(lambda: at_rest(gateway.url))
        assert metric(gateway.url, "kvist_tokenizer_as_text_total") == 0
