"""Workers that die, hang, lie or break off; clients that leave or read slowly: each has its outcome.

All with real processes. Afterwards nothing is reserved, nothing is open, and others were served.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from gateway_processes import at_rest, call, chat, fake, metric, running, state, wait_for

CHAT = "/v1/chat/completions"


def send_raw(url: str, body: bytes, path: str = CHAT) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_answers_and_streams_pass_byte_for_byte() -> None:
    worker = fake()
    with running([worker]) as gateway:
        direct, through = call(worker.url, CHAT, chat()), call(gateway.url, CHAT, chat())
        assert through[0] == 200 and through[1] == direct[1]
        assert "x-kvist-worker" not in through[2]
        streams = []
        for url in (worker.url, gateway.url):
            sock = send_raw(url, json.dumps(chat(stream=True)).encode())
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += sock.recv(65536)
            sock.close()
            streams.append(data.split(b"\r\n\r\n", 1)[1])
        assert streams[0] == streams[1] and b"data: [DONE]" in streams[0]
        explained = call(gateway.url, CHAT, chat(), x_kvist_explain="1")[2]
        assert explained["x-kvist-worker"] == worker.url
        assert float(explained["x-kvist-predicted-latency"]) >= 0
        assert metric(gateway.url, "kvist_requests_total", outcome="ok") == 3
        assert metric(gateway.url, "kvist_cached_true_total") == 100
        wait_for(lambda: at_rest(gateway.url))


def test_a_broken_worker_is_retried_elsewhere_and_then_left_alone() -> None:
    bad, good = fake("error"), fake()
    with running([bad, good], "--policy=round_robin", "--cb-failure-threshold=3") as gateway:
        for i in range(12):
            assert call(gateway.url, CHAT, chat(f"{i}"))[0] == 200
        assert metric(gateway.url, "kvist_retries_total", worker=bad.url) == 3, "then its breaker is open"
        assert metric(gateway.url, "kvist_worker_breaker", worker=bad.url, state="open") == 1
        assert at_rest(gateway.url)


@pytest.mark.parametrize(("mode", "words"), [("garbage", "not valid HTTP"), ("hang", "no answer in time")])
def test_without_another_worker_the_client_is_told(mode: str, words: str) -> None:
    with running([fake(mode)], "--first-byte-timeout=2") as gateway:
        start = time.monotonic()
        status, body, _ = call(gateway.url, CHAT, chat())
        assert status == 502 and words in json.loads(body)["error"]["message"]
        assert time.monotonic() - start < 10
        assert at_rest(gateway.url)
        assert metric(gateway.url, "kvist_requests_total", outcome="failed") == 1


@pytest.mark.parametrize("mode", ["garbage", "hang"])
def test_with_another_worker_the_client_notices_nothing(mode: str) -> None:
    bad, good = fake(mode), fake()
    with running([bad, good], "--policy=round_robin", "--first-byte-timeout=2") as gateway:
        assert [call(gateway.url, CHAT, chat(f"{i}"))[0] for i in range(4)] == [200] * 4
        assert metric(gateway.url, "kvist_retries_total", worker=bad.url) >= 1
        assert at_rest(gateway.url)


def test_an_answer_that_breaks_off_is_cut_not_completed() -> None:
    with running([fake("cut")]) as gateway:
        sock = send_raw(gateway.url, json.dumps(chat(stream=True)).encode())
        data = b""
        with pytest.raises(ConnectionError):
            while piece := sock.recv(65536):
                data += piece
            raise ConnectionError  # closed without the end of the chunks
        assert b"data:" in data and not data.endswith(b"0\r\n\r\n")
        assert metric(gateway.url, "kvist_cut_total") == 1
        assert at_rest(gateway.url)


def test_a_worker_killed_amid_its_streams() -> None:
    dying, good = fake("slow"), fake()
    with running([dying, good], "--policy=round_robin", "--health-check-interval=0.3") as gateway:
        body = json.dumps(chat(stream=True)).encode()
        streams = []
        for _ in range(6):
            streams.append(send_raw(gateway.url, body))
            time.sleep(0.02)
        time.sleep(0.3)
        dying.signal(signal.SIGKILL)
        ends = []
        for sock in streams:
            data = b""
            try:
                while not data.endswith(b"0\r\n\r\n") and (piece := sock.recv(65536)):
                    data += piece
            except ConnectionError:
                pass
            ends.append(data.endswith(b"0\r\n\r\n"))
            sock.close()
        assert ends.count(True) == 3 and ends.count(False) == 3, "those on the other worker are whole"
        assert metric(gateway.url, "kvist_cut_total", worker=dying.url) == 3
        assert [call(gateway.url, CHAT, chat(f"{i}"))[0] for i in range(6)] == [200] * 6
        wait_for(lambda: at_rest(gateway.url))
        wait_for(lambda: metric(gateway.url, "kvist_worker_healthy", worker=dying.url) == 0)
        assert metric(gateway.url, "kvist_worker_upstream_connections", worker=dying.url) == 0


def test_a_thousand_requests_of_which_a_third_leave() -> None:
    workers = [fake() for _ in range(3)]
    with running(workers) as gateway:
        rng = Random(1)
        leave = [rng.random() < 0.3 for _ in range(1000)]
        body = json.dumps(chat("x" * 3000, stream=True)).encode()

        def one(early: bool) -> bool:
            sock = send_raw(gateway.url, body)
            if early:
                sock.close()
                return True
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                piece = sock.recv(65536)
                if not piece:
                    return False
                data += piece
            sock.close()
            return b"[DONE]" in data

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(one, leave)), "every client that stayed was served"
        wait_for(lambda: at_rest(gateway.url))
        wait_for(lambda: metric(gateway.url, "kvist_client_connections") <= 2)
        ended = metric(gateway.url, "kvist_requests_total")
        assert leave.count(False) <= ended <= 1000


def test_a_slow_reader_makes_no_memory_grow() -> None:
    """32 clients ask for endless streams and read nothing; reading from the worker stops."""
    with running([fake("flood")], "--slow-client-timeout=2") as gateway:
        before = gateway.rss()
        clients = [send_raw(gateway.url, json.dumps(chat(stream=True)).encode()) for _ in range(32)]
        time.sleep(1.5)
        grown = gateway.rss() - before
        assert grown < 48 << 20, f"{grown >> 20} MiB for 32 slow readers"
        wait_for(lambda: at_rest(gateway.url))  # they are cut after the timeout
        for sock in clients:
            sock.close()


def test_overload_is_refused_with_a_time_to_come_back() -> None:
    with running(
        [fake("hang")],
        "--max-concurrent-requests=4",
        "--queue-size=4",
        "--queue-timeout=1",
        "--first-byte-timeout=3",
    ) as gateway:
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(lambda i: call(gateway.url, CHAT, chat(f"{i}")), range(20)))
        refused = [headers for status, _, headers in results if status == 503]
        assert len(refused) >= 12, "12 at once for want of a place, the queued ones after a second"
        assert all(int(headers["retry-after"]) >= 1 for headers in refused)
        assert metric(gateway.url, "kvist_refused_requests_total", status="503") == len(refused)
        wait_for(lambda: at_rest(gateway.url))


def test_sigterm_lets_requests_end() -> None:
    worker = fake("slow")
    with running([worker], "--drain-timeout=10") as gateway:
        sock = send_raw(gateway.url, json.dumps(chat(stream=True)).encode())
        sock.recv(1000)
        gateway.signal(signal.SIGTERM)
        time.sleep(0.5)
        assert gateway.process.poll() is None, "it waits for the stream"
        with pytest.raises(OSError):
            send_raw(gateway.url, b"{}")
        sock.close()
        assert gateway.process.wait(8) == 0


def test_workers_come_and_go_under_load() -> None:
    first, second = fake(), fake()
    with running([first], "--admin-key=secret") as gateway:
        stop = threading.Event()
        statuses: list[int] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    statuses.append(call(gateway.url, CHAT, chat())[0])
                except OSError:  # a hang: it must not end the thread unseen
                    statuses.append(0)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        key = {"authorization": "Bearer secret"}
        assert call(gateway.url, "/workers", {"url": second.url})[0] == 401
        assert call(gateway.url, "/workers", {"url": second.url}, **key)[0] == 201
        assert call(gateway.url, "/workers", {"url": second.url}, **key)[0] == 400
        wait_for(lambda: len(state(gateway.url)["workers"]) == 2)
        time.sleep(0.3)
        assert call(gateway.url, f"/workers/{first.url}", method="DELETE", **key)[0] == 200
        assert call(gateway.url, "/policy", {"policy": "least_load"}, **key)[0] == 200
        assert call(gateway.url, "/policy", {"policy": "none"}, **key)[0] == 400
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200} and len(statuses) > 20
        data = state(gateway.url)
        assert [worker["id"] for worker in data["workers"]] == [second.url]
        assert data["policy"] == "least_load" and at_rest(gateway.url)
        second.stop()
        first.stop()


def test_keys_limits_and_models() -> None:
    worker = fake()
    with running([worker], "--api-key=one", "--api-key=two", "--rate-limit=0.2") as gateway:
        url = gateway.url
        assert call(url, CHAT, chat())[0] == 401
        assert call(url, CHAT, chat(), authorization="Bearer three")[0] == 401
        assert call(url, CHAT, chat(), authorization="Bearer one")[0] == 200
        status, _, headers = call(url, CHAT, chat(), authorization="Bearer one")
        assert status == 429 and int(headers["retry-after"]) >= 1
        assert call(url, CHAT, chat(), authorization="Bearer two")[0] == 200, "each key has its own bucket"
        assert call(url, "/health")[0] == 200, "health needs no key"
    worker = fake()
    with running([worker], "--max-payload-size=2000") as gateway:
        url = gateway.url
        wait_for(lambda: b'"fake"' in call(url, "/v1/models")[1])
        status, body, _ = call(url, CHAT, chat(model="other"))
        assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"
        assert call(url, CHAT, chat(model="fake"))[0] == 200
        assert call(url, CHAT, chat("x" * 3000))[0] == 413
        assert call(url, CHAT, b"{not json")[0] == 400
        assert call(url, CHAT, {"model": "fake"})[0] == 400
        assert call(url, "/v1/unknown", {})[0] == 404
        assert call(url, CHAT)[0] == 405
        assert metric(url, "kvist_refused_requests_total", status="413") == 1
