"""Two gateways that share over Redis, as real processes: told, lost, hung, back.

Redis is the real server where one is installed, else fakeredis behind a socket.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gateway_processes import SECONDS, Process, call, chat, fake, free_port, gateway, wait_for

from kvist.gateway.sharing.fleet import SharedFleet
from kvist.gateway.sharing.redis import TIMEOUT, RedisExchange
from kvist.routing import Router, make_policy

FAKEREDIS = (
    "import sys; from fakeredis import TcpFakeServer; TcpFakeServer.allow_reuse_address = True; "
    "TcpFakeServer(('127.0.0.1', int(sys.argv[1])), server_type='redis').serve_forever()"
)


class Redis:
    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        server = shutil.which("redis-server")
        command = [sys.executable, "-c", FAKEREDIS, str(self.port)]
        if server is not None:
            command = [server, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
            command += ["--dir", str(self.folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.reachable)

    def reachable(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(SECONDS)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.importorskip("fakeredis", reason="neither redis-server nor fakeredis is installed")
    pytest.importorskip("redis", reason="redis is not installed: pip install 'kvist[redis]'")
    found = Redis(tmp_path)
    yield found
    found.stop()


class Streams:
    """Endless answers through a gateway."""

    def __init__(self, url: str, count: int) -> None:
        self.open = []
        self.soonest = SECONDS  # after which one of them began
        for number in range(count):
            asked = time.monotonic()
            self.open.append(self._start(url, number))
            self.soonest = min(self.soonest, time.monotonic() - asked)

    def _start(self, url: str, number: int) -> Any:
        body = json.dumps(chat(f"{number} endless", stream=True)).encode()
        answer = urllib.request.urlopen(
            urllib.request.Request(url + "/v1/chat/completions", body), timeout=SECONDS
        )
        answer.read(10)
        return answer

    def close(self) -> None:
        for answer in self.open:
            answer.close()


def in_flight(process: Process) -> int:
    return sum(row["in_flight"] for row in json.loads(call(process.url, "/workers")[1])["workers"])


def metric(process: Process, name: str) -> float:
    text = call(process.url, "/metrics")[1].decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"kvist_{name} "))


def logged(process: Process, event: str) -> int:
    return sum(f'"event":"{event}' in line for line in process.lines)


def test_gateways_hear_of_each_other_and_outlive_redis(redis: Redis) -> None:
    workers = [fake("slow"), fake("slow")]
    options = ("--share-url", redis.url, "--share-interval", "0.1")
    started: list[Process] = []
    streams: list[Streams] = []
    try:
        started += [gateway(workers, *options), gateway(workers, *options)]
        first, second = started
        wait_for(lambda: metric(first, "sharing_peers") == metric(second, "sharing_peers") == 1)
        streams.append(Streams(first.url, 4))
        wait_for(lambda: in_flight(second) == 4)
        streams.append(Streams(second.url, 3))
        wait_for(lambda: in_flight(first) == in_flight(second) == 7)

        redis.process.send_signal(signal.SIGSTOP)  # it hangs: the worst way to be lost
        wait_for(lambda: in_flight(first) == 4 and in_flight(second) == 3)
        streams.append(Streams(first.url, 5))
        assert streams[-1].soonest < TIMEOUT, "not all of them waited for Redis"
        wait_for(lambda: in_flight(first) == 9)
        assert in_flight(second) == 3
        redis.process.send_signal(signal.SIGCONT)
        wait_for(lambda: in_flight(first) == in_flight(second) == 12)

        redis.stop()
        wait_for(lambda: in_flight(first) == 9 and in_flight(second) == 3)
        wait_for(lambda: metric(first, "sharing_connected") == 0)
        assert call(first.url, "/health")[0] == call(second.url, "/health")[0] == 200
        redis.start()
        wait_for(lambda: in_flight(first) == in_flight(second) == 12)
        assert logged(first, "sharing lost") >= 2

        started.pop().stop()  # a gateway that ends takes its share with it
        wait_for(lambda: in_flight(first) == 9)
        assert metric(first, "sharing_connected") == 1
    finally:
        for group in streams:
            group.close()
        for process in started + workers:
            process.stop()


def test_traffic_does_not_wait_for_redis_that_was_never_there() -> None:
    workers = [fake()]
    started: list[Process] = []
    try:
        started.append(gateway(workers, "--share-url", "redis://127.0.0.1:1/0"))
        wait_for(lambda: call(started[0].url, "/health")[0] == 200)
        for i in range(20):
            assert call(started[0].url, "/v1/chat/completions", chat(str(i)))[0] == 200
        wait_for(lambda: logged(started[0], "sharing lost") == 1)
        assert metric(started[0], "sharing_connected") == 0
    finally:
        for process in started + workers:
            process.stop()


def test_a_gateway_that_starts_takes_over_what_a_peer_learned(redis: Redis) -> None:
    workers = [fake(), fake()]
    options = ("--share-url", redis.url, "--share-interval", "0.1")
    started: list[Process] = []
    try:
        started.append(gateway(workers, *options))
        wait_for(lambda: call(started[0].url, "/health")[0] == 200)
        for i in range(40):
            assert call(started[0].url, "/v1/chat/completions", chat(f"{i} " * 50))[0] == 200
        started[0].stop()  # what it learned stays behind for some minutes

        # It told at its start, when nothing was learned: tell again as its next turn would.
        asyncio.run(_tell_learned(redis.url, workers))
        started.append(gateway(workers, *options))
        wait_for(lambda: logged(started[1], "took over what a peer learned") == 1)
        assert call(started[1].url, "/v1/chat/completions", chat("next"))[0] == 200
    finally:
        for process in started + workers:
            process.stop()


async def _tell_learned(url: str, workers: list[Process]) -> None:
    from kvist.model import Query
    from kvist.routing import Outcome

    router = Router(make_policy("lbgr", rng=Random(1)))
    for worker in workers:
        router.add_worker(worker.url)
    for i in range(30):
        ticket = router.route(Query(i, bytes(400)), float(i))
        router.complete(ticket, Outcome(), i + 0.5)
    exchange = RedisExchange(SharedFleet(router, "peer", 1, 1.0), url, interval=0.1)
    task = asyncio.get_running_loop().create_task(exchange.run())
    async with asyncio.timeout(SECONDS):
        while not await exchange._redis.exists("kvist:{default}:learned:peer"):
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_strangers_bytes_under_the_keys_are_refused_and_counted(redis: Redis) -> None:
    import redis as client

    with client.Redis.from_url(redis.url) as raw:
        raw.zadd("kvist:{default}:gateways", {"odd": time.time(), "set": time.time()})
        raw.set("kvist:{default}:share:odd", b"\xff\x00 not a share")
        raw.set("kvist:{default}:learned:odd", b"{")
        raw.sadd("kvist:{default}:share:set", "wrong type")

    async def run() -> RedisExchange:
        router = Router(make_policy("lbgr", rng=Random(1)))
        router.add_worker("w")
        exchange = RedisExchange(SharedFleet(router, "me", 1, 1.0), redis.url, interval=0.05)
        task = asyncio.get_running_loop().create_task(exchange.run())
        for _ in range(4000):
            await asyncio.sleep(0.02)
            if exchange.refused >= 2:
                break
        assert exchange.connected and exchange.peers == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return exchange

    assert asyncio.run(run()).refused >= 2


def test_a_bad_url_and_a_missing_client_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedFleet(Router(make_policy("lbgr")), "me", 1, 1.0)
    pytest.importorskip("redis", reason="redis is not installed: pip install 'kvist[redis]'")
    with pytest.raises(ValueError, match="share_url 'http://x'"):
        RedisExchange(shared, "http://x")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ValueError, match=r"pip install 'kvist\[redis\]'"):
        RedisExchange(shared, "redis://127.0.0.1/0")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kvist",
            "serve",
            "--worker-urls",
            "http://127.0.0.1:1",
            "--share-url",
            "http://x",
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2 and "share_url" in done.stderr and "Traceback" not in done.stderr
