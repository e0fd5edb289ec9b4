"""The load: `wrk` where it is installed, else this file's own generator; both in a process of their own.

Closed loop: each connection sends its next request when the last one is answered. The first half of a prompt
is shared within one of GROUPS groups, the second half is new with every request.

    python load.py URL CONNECTIONS SECONDS PROMPT_BYTES STREAM RUN      # the own generator; prints RESULT {…}
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

GROUPS = 32
PATH = "/v1/chat/completions"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Result:
    """Requests answered, seconds, latency percentiles in seconds, requests that were not answered 200, and
    the proxy's CPU seconds meanwhile.
    """

    requests: int
    seconds: float
    p50: float
    p90: float
    p99: float
    errors: int
    cpu: float = 0.0

    @property
    def cpu_each(self) -> float:
        return self.cpu / max(self.requests, 1)

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def generator(choice: str = "auto") -> str:
    """`wrk` or `own`. Raises ValueError where wrk is asked for and absent."""
    found = shutil.which("wrk") is not None
    if choice == "wrk" and not found:
        raise ValueError("--load wrk: wrk is not installed (apt-get install wrk), or use --load own")
    return choice if choice != "auto" else ("wrk" if found else "own")


def drive(tool: str, url: str, connections: int, seconds: float, size: int, stream: bool, run: int) -> Result:
    """Put load on a URL. Raises RuntimeError if the generator fails."""
    flag = str(int(stream))
    if tool == "wrk":
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(round(seconds), 1)}s", "--timeout", "10s"]
        command += ["-s", str(HERE / "post.lua"), url + PATH, "--", str(size), flag, str(run)]
    else:
        command = [sys.executable, str(HERE / "load.py"), url, str(connections), str(seconds)]
        command += [str(size), flag, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{tool} failed: {done.stdout} {done.stderr}")
    return Result(**json.loads(line.removeprefix("RESULT ")))


class Bodies:
    """The same requests as post.lua makes."""

    def __init__(self, size: int, stream: bool, run: int) -> None:
        def letters(seed: int, n: int) -> str:
            return "".join(Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=n))

        tail = letters(99, size // 2 - 20) + '"}]}'
        self.tail = tail.encode()
        self.heads = []
        for group in range(GROUPS):
            head = (
                f'{{"model":"fake","stream":{str(stream).lower()},"max_tokens":8,"messages":[{{"role":"system",'
                f'"content":"{letters(group, size // 2)}"}},{{"role":"user","content":"'
            )
            self.heads.append(
                f"POST {PATH} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
                f"content-length: {len(head) + 20 + len(tail)}\r\n\r\n{head}".encode()
            )
        self.run, self.count = run, 0

    def next(self) -> bytes:
        self.count += 1
        return self.heads[self.count % GROUPS] + b"%08d%012d" % (self.run, self.count) + self.tail


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, bodies: Bodies, times: list[float], errors: list[int]) -> None:
        self.bodies, self.times, self.errors = bodies, times, errors

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools

        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.parser = httptools.HttpResponseParser(self)
        self.send()

    def send(self) -> None:
        self.start = time.perf_counter()
        self.transport.write(self.bodies.next())

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.errors[0] += 1

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() == 200:
            self.times.append(time.perf_counter() - self.start)
        else:
            self.errors[0] += 1
        self.send()


async def _own(url: str, connections: int, seconds: float, size: int, stream: bool, run: int) -> Result:
    parts = urlsplit(url)
    bodies, times, errors = Bodies(size, stream, run), [], [0]
    start = time.perf_counter()
    clients = [
        await asyncio.get_running_loop().create_connection(
            lambda: Client(bodies, times, errors), parts.hostname, parts.port
        )
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    spent, failed, ordered = time.perf_counter() - start, errors[0], sorted(times)
    for transport, _ in clients:
        transport.abort()
    if not ordered:
        return Result(0, spent, 0.0, 0.0, 0.0, failed)
    p50, p90, p99 = (ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.5, 0.9, 0.99))
    return Result(len(ordered), spent, p50, p90, p99, failed)


if __name__ == "__main__":
    from dataclasses import asdict

    import uvloop

    url, connections, seconds, size, stream, run = sys.argv[1:]
    found = uvloop.run(_own(url, int(connections), float(seconds), int(size), stream == "1", int(run)))
    print("RESULT", json.dumps(asdict(found)))
