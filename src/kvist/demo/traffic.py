"""Sends a workload to a gateway over HTTP and measures with the client's own clock."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kvist.http.client import Header, Pool
from kvist.workloads.gsp import GSP

TIMEOUT = 300.0
_CACHED = re.compile(rb'"prompt_tokens":(\d+).*?"cached_tokens":(\d+)', re.S)
# Any byte as a character that JSON leaves alone, so that a token stays four bytes of text.
_LETTERS = bytes(
    b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ."[b & 63] for b in range(256)
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One answered request; times in seconds of the client's clock, `at` and `late` of the plan.

    at: after the start it was to be sent; late: how much later it was.
    """

    at: float
    late: float
    ttft: float
    latency: float
    prompt_tokens: int
    cached_tokens: int
    ended: float


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send: seconds after the start, and the body."""

    at: float
    body: bytes


def jobs(workload: GSP, speed: float) -> list[Job]:
    """The workload as chat requests: a system message that the group shares, a question of one's own."""
    found = []
    for query in workload:
        group = int(query.session.removeprefix("group"))
        cut = 4 * round(workload.lengths[group % len(workload.lengths)] * workload.shared)
        shared = query.prompt[:cut].translate(_LETTERS).decode()
        own = query.prompt[cut:].translate(_LETTERS).decode()
        body = {
            "model": "demo",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": query.output_tokens,
            "messages": [
                {"role": "system", "content": f"group {group} {shared}"},
                {"role": "user", "content": f"question {query.id} {own}"},
            ],
        }
        found.append(Job(query.arrival / speed, msgspec.json.encode(body)))
    return found


class _Call:
    """One request under way; see kvist.http.client.Exchange."""

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.first = 0.0
        self.tail = b""

    def response_head(self, status: int, headers: list[Header], body: bytes) -> None:
        self.status = status
        if body:
            self.response_data(body)

    def response_data(self, data: bytes) -> None:
        if not self.first:
            self.first = time.monotonic()
        self.tail = (self.tail + data)[-1024:]

    def response_done(self, reusable: bool) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def response_failed(self, reason: str, *, stale: bool) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(reason))


async def _send(pool: Pool, job: Job, began: float) -> Sent | None:
    """None if the request was refused or broke."""
    start = time.monotonic()
    call = _Call()
    try:
        connection = pool.take() or await pool.connect(5.0)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n" % (
            pool.authority
        )
        connection.send(call, head + b"content-length: %d\r\n\r\n" % len(job.body) + job.body)
        async with asyncio.timeout(TIMEOUT):
            await call.done
    except (OSError, TimeoutError):
        return None
    end = time.monotonic()
    usage = _CACHED.search(call.tail)
    if call.status != 200 or usage is None:
        return None
    late = start - began - job.at
    return Sent(job.at, late, call.first - start, end - start, int(usage[1]), int(usage[2]), end)


async def _drive(
    url: str, work: Sequence[Job], progress: Callable[[], None]
) -> tuple[list[Sent], int, float]:
    pool = Pool(url, keep=1024)
    start = time.monotonic()
    tasks = []
    for job in work:
        wait = start + job.at - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(_send(pool, job, start))
        task.add_done_callback(lambda _: progress())
        tasks.append(task)
    results = await asyncio.gather(*tasks)
    pool.close()
    sent = [result for result in results if result is not None]
    ended = max((result.ended for result in sent), default=start)
    return sent, len(results) - len(sent), ended - start


def drive(url: str, work: Sequence[Job], progress: Callable[[], None]) -> tuple[list[Sent], int, float]:
    """Send every job at its time: the answered ones, how many were not, and the seconds it all took."""
    return asyncio.run(_drive(url, work, progress))
