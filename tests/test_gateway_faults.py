"""Workers that die, hang, lie or break off; clients that leave or read slowly: each has its outcome.

All with real processes. Afterwards nothing is reserved, nothing is open, and others were served.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from gateway_processes import (
    SECONDS,
    at_rest,
    call,
    chat,
    engine,
    fake,
    free_port,
    metric,
    nothing_left,
    running,
    running_without_urls,
    state,
    wait_for,
)

CHAT = "/v1/chat/completions"


def send_raw(url: str, body: bytes, path: str = CHAT, **headers: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=SECONDS)
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n"
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
        nothing_left(gateway)


def test_a_broken_worker_is_retried_elsewhere_and_then_left_alone() -> None:
    bad, good = fake("error"), fake()
    with running([bad, good], "--policy=round_robin", "--cb-failure-threshold=3") as gateway:
        for i in range(12):
            assert call(gateway.url, CHAT, chat(f"{i}"))[0] == 200
        assert metric(gateway.url, "kvist_retries_total", worker=bad.url) == 3, "then its breaker is open"
        assert metric(gateway.url, "kvist_worker_breaker", worker=bad.url, state="open") == 1
        nothing_left(gateway)


@pytest.mark.parametrize(("mode", "words"), [("garbage", "not valid HTTP"), ("hang", "no answer in time")])
def test_without_another_worker_the_client_is_told(mode: str, words: str) -> None:
    with running([fake(mode)], "--first-byte-timeout=2") as gateway:
        status, body, _ = call(gateway.url, CHAT, chat())
        assert status == 502 and words in json.loads(body)["error"]["message"]
        nothing_left(gateway)
        assert metric(gateway.url, "kvist_requests_total", outcome="failed") == 1


@pytest.mark.parametrize("mode", ["garbage", "hang"])
def test_with_another_worker_the_client_notices_nothing(mode: str) -> None:
    bad, good = fake(mode), fake()
    with running([bad, good], "--policy=round_robin", "--first-byte-timeout=2") as gateway:
        assert [call(gateway.url, CHAT, chat(f"{i}"))[0] for i in range(4)] == [200] * 4
        assert metric(gateway.url, "kvist_retries_total", worker=bad.url) >= 1
        nothing_left(gateway)


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
        nothing_left(gateway)


def test_a_worker_killed_amid_its_streams() -> None:
    dying, good = fake("slow"), fake()
    with running([dying, good], "--policy=round_robin", "--health-check-interval=0.3") as gateway:
        body = json.dumps(chat(stream=True)).encode()
        streams = [send_raw(gateway.url, body) for _ in range(6)]
        begun = [sock.recv(65536) for sock in streams]  # an answer that has begun is not tried elsewhere
        dying.signal(signal.SIGKILL)
        ends = []
        for sock, data in zip(streams, begun, strict=True):
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
        nothing_left(gateway)
        wait_for(lambda: metric(gateway.url, "kvist_worker_healthy", worker=dying.url) == 0)
        assert metric(gateway.url, "kvist_worker_upstream_connections", worker=dying.url) == 0


def test_a_dead_engine_has_no_cache() -> None:
    worker = fake()
    with running([worker], "--health-check-interval=0.3") as gateway:
        assert call(gateway.url, CHAT, chat("a long prompt " * 500))[0] == 200
        (row,) = state(gateway.url)["workers"]
        assert row["index_tokens"] > 5_000
        worker.signal(signal.SIGKILL)
        wait_for(lambda: state(gateway.url)["workers"][0]["index_tokens"] == 0)
        nothing_left(gateway)


def test_ten_thousand_requests_of_which_a_third_leave() -> None:
    """They leave amid the head, amid the body, at once after it, or amid the answer; by FIN or by RST."""
    workers = [fake("steady") for _ in range(3)]
    with running(workers) as gateway:
        asyncio.run(storm(gateway.url, 500, 64, seed=1))  # the gateway's own size, once warm
        nothing_left(gateway)
        before, files = gateway.rss(), gateway.files()
        result = asyncio.run(storm(gateway.url, 10_000, 64, seed=2))
        assert result["served"] == result["stayed"] > 6_500, "every client that stayed was served whole"
        assert result["left"] > 2_500
        nothing_left(gateway)
        ended = {
            outcome: metric(gateway.url, "kvist_requests_total", outcome=outcome)
            for outcome in ("ok", "cancelled", "failed")
        }
        assert ended["failed"] == 0 and ended["cancelled"] > 500
        assert ended["ok"] >= result["served"]
        assert gateway.files() - files < 64 + 8, "kept connections to workers at most"
        grown = gateway.rss() - before
        assert grown < 24 << 20, f"{grown >> 20} MiB after 10 000 requests"
        assert not [line for line in gateway.lines if "Traceback" in line]


async def storm(url: str, total: int, at_once: int, seed: int) -> dict[str, int]:
    """Requests over connections that are kept until their client leaves. Counts by what became of them."""
    host, port = url.removeprefix("http://").split(":")
    rng, counts, left = Random(seed), Counter[str](), iter(range(total))
    shared = "shared " * 300

    async def client() -> None:
        reader: asyncio.StreamReader | None = None
        writer: asyncio.StreamWriter | None = None
        for i in left:
            if writer is None:
                reader, writer = await asyncio.open_connection(host, int(port))
            assert reader is not None
            body = json.dumps(chat(f"{shared}{i}", stream=True)).encode()
            data = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body))
            data += body
            if rng.random() < 0.3:
                how = rng.choice((20, len(data) // 2, len(data), len(data)))
                writer.write(data[:how])
                await writer.drain()
                if how == len(data) and rng.random() < 0.5:
                    await reader.read(10)
                if rng.random() < 0.5:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()
                writer = None
                counts["left"] += 1
                continue
            counts["stayed"] += 1
            writer.write(data)
            answer = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), SECONDS)
            counts["served"] += answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer
        if writer is not None:
            writer.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return counts


def test_a_worker_that_cannot_be_connected_to() -> None:
    """Refused, reset at once, or never accepted: the request goes elsewhere, and all is given back."""
    nobody = f"http://127.0.0.1:{free_port()}"
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    fillers = [socket.socket() for _ in range(4)]
    for sock in fillers:
        sock.setblocking(False)
        sock.connect_ex(full.getsockname())
    never = f"http://127.0.0.1:{full.getsockname()[1]}"
    good = fake()
    extra = ("--worker-urls", nobody, "--worker-urls", never)
    options = ("--policy=round_robin", "--connect-timeout=1", "--retry-max-retries=3")
    with running([fake("close"), good], *extra, *options) as gateway:
        bad = [nobody, never]
        assert [call(gateway.url, CHAT, chat(f"{i}"))[0] for i in range(8)] == [200] * 8
        for url in bad:
            assert metric(gateway.url, "kvist_retries_total", worker=url) >= 1
            assert metric(gateway.url, "kvist_worker_upstream_connections", worker=url) == 0
        nothing_left(gateway)
    full.close()
    for sock in fillers:
        sock.close()


def test_a_breaker_lets_a_worker_that_recovered_back_in() -> None:
    with running([fake("error")], "--cb-failure-threshold=2", "--cb-timeout-duration=1") as gateway:
        worker = state(gateway.url)["workers"][0]["id"]
        assert [call(gateway.url, CHAT, chat())[0] for _ in range(2)] == [500, 500], "its own answer"

        def refused() -> bool:
            """While its breaker is open; after a second one request may try, and opens it again."""
            status, _, headers = call(gateway.url, CHAT, chat())
            return status == 503 and int(headers["retry-after"]) >= 1

        wait_for(refused)
        call(worker, "/mode", b"ok")
        wait_for(lambda: call(gateway.url, CHAT, chat())[0] == 200)
        assert metric(gateway.url, "kvist_worker_breaker", worker=worker, state="closed") == 1
        nothing_left(gateway)


def test_a_worker_that_is_only_full_keeps_its_breaker_closed() -> None:
    busy, good = fake("busy"), fake()
    with running([busy, good], "--policy=round_robin", "--cb-failure-threshold=2") as gateway:
        assert [call(gateway.url, CHAT, chat(f"{i}"))[0] for i in range(12)] == [200] * 12
        assert metric(gateway.url, "kvist_retries_total", worker=busy.url) >= 6
        assert metric(gateway.url, "kvist_worker_breaker", worker=busy.url, state="closed") == 1
        good.stop()

        def in_the_workers_own_words() -> bool:
            status, _, headers = call(gateway.url, CHAT, chat())
            return status == 503 and headers["retry-after"] == "1"

        wait_for(in_the_workers_own_words)


def test_clients_that_leave_the_queue() -> None:
    options = ("--max-concurrent-requests=2", "--queue-size=20", "--first-byte-timeout=300")
    with running([fake("hang")], *options) as gateway:
        body = json.dumps(chat()).encode()
        clients = [send_raw(gateway.url, body) for _ in range(12)]
        wait_for(lambda: state(gateway.url)["queued"] == 10)
        for sock in clients[:7]:
            sock.close()
        wait_for(lambda: state(gateway.url)["queued"] == 3)
        assert state(gateway.url)["active"] == 2, "two who waited took the places of those who left"
        for sock in clients[7:]:
            sock.close()
        nothing_left(gateway)


def test_a_slow_reader_makes_no_memory_grow() -> None:
    """32 clients ask for endless streams and read nothing; reading from the worker stops."""
    with running([fake("flood")], "--slow-client-timeout=2") as gateway:
        before = gateway.rss()
        clients = [send_raw(gateway.url, json.dumps(chat(stream=True)).encode()) for _ in range(32)]
        time.sleep(1.5)
        grown = gateway.rss() - before
        assert grown < 48 << 20, f"{grown >> 20} MiB for 32 slow readers"
        nothing_left(gateway)  # they are cut after the timeout
        for sock in clients:
            sock.close()


def test_overload_is_refused_with_a_time_to_come_back() -> None:
    with running(
        [fake("hang")],
        "--max-concurrent-requests=4",
        "--queue-size=4",
        "--queue-timeout=1",
        "--first-byte-timeout=8",
    ) as gateway:
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(lambda i: call(gateway.url, CHAT, chat(f"{i}")), range(20)))
        refused = [headers for status, _, headers in results if status == 503]
        assert len(refused) >= 12, "12 at once for want of a place, the queued ones after a second"
        assert all(int(headers["retry-after"]) >= 1 for headers in refused)
        assert metric(gateway.url, "kvist_refused_requests_total", status="503") == len(refused)
        nothing_left(gateway)


def test_sigterm_lets_a_stream_come_to_its_end() -> None:
    with running([engine("--speed=5")]) as gateway:
        sock = send_raw(gateway.url, json.dumps(chat(stream=True, max_tokens=150)).encode())
        data = sock.recv(1000)
        gateway.signal(signal.SIGTERM)
        while piece := sock.recv(65536):
            data += piece
        assert data.count(b"data: {") == 150 and data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert gateway.process.wait(SECONDS) == 0


def test_sighup_takes_over_workers_and_keys_and_bad_settings_change_nothing(tmp_path: Path) -> None:
    first, second = fake(), fake()
    config = tmp_path / "gateway.toml"

    def write(url: str, key: str) -> None:
        config.write_text(f'[serve]\nworker-urls = ["{url}"]\napi-keys = ["{key}"]\n')

    def workers() -> list[str]:
        data = json.loads(call(gateway.url, "/workers", authorization=f"Bearer {key}")[1])
        return [worker["id"] for worker in data.get("workers", [])]

    write(first.url, key := "one")
    with running_without_urls([first, second], f"--config={config}") as gateway:
        assert workers() == [first.url]
        slow = send_raw(gateway.url, json.dumps(chat()).encode(), authorization="Bearer one")
        assert slow.recv(12) == b"HTTP/1.1 200"
        write(second.url, key := "two")
        gateway.signal(signal.SIGHUP)
        wait_for(lambda: workers() == [second.url])
        assert call(gateway.url, CHAT, chat(), authorization="Bearer one")[0] == 401
        assert call(gateway.url, CHAT, chat(), authorization="Bearer two")[0] == 200
        config.write_text("worker-urls = [")
        gateway.signal(signal.SIGHUP)
        wait_for(lambda: any("reload failed" in line for line in gateway.lines))
        assert workers() == [second.url]
        assert call(gateway.url, CHAT, chat(), authorization="Bearer two")[0] == 200


def test_sigterm_lets_requests_end() -> None:
    worker = fake("slow")
    with running([worker], "--drain-timeout=300") as gateway:
        sock = send_raw(gateway.url, json.dumps(chat(stream=True)).encode())
        sock.recv(1000)
        gateway.signal(signal.SIGTERM)

        def refuses() -> bool:
            try:
                send_raw(gateway.url, b"{}").close()
            except OSError:
                return True
            return False

        wait_for(refuses)
        assert sock.recv(1000) and gateway.process.poll() is None, "it waits for the stream"
        sock.close()
        assert gateway.process.wait(SECONDS) == 0


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
        served = len(statuses)
        wait_for(lambda: len(statuses) > served + 20)
        assert call(gateway.url, f"/workers/{first.url}", method="DELETE", **key)[0] == 200
        assert call(gateway.url, "/policy", {"policy": "least_load"}, **key)[0] == 200
        assert call(gateway.url, "/policy", {"policy": "none"}, **key)[0] == 400
        served = len(statuses)
        wait_for(lambda: len(statuses) > served + 20)
        stop.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        data = state(gateway.url)
        assert [worker["id"] for worker in data["workers"]] == [second.url]
        assert data["policy"] == "least_load" and at_rest(gateway.url)
        second.stop()
        first.stop()


def test_keys_limits_and_models() -> None:
    worker = fake()
    with running([worker], "--api-key=one", "--api-key=two", "--rate-limit=0.01") as gateway:
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
