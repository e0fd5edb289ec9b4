"""The gateway at a multiple of its workers' capacity: what is served, what is refused, how much memory.

    python -m benchmarks.gateway.overload [--times 3] [--seconds 30] [--slots 20] [--json] [-- OPTIONS…]

Workers with a fixed number of slots (SERVICE seconds a request each) have a capacity that is known: it is
measured first, closed loop. Then requests come at `--times` that rate whatever happens to the earlier ones
(open loop), for `--seconds`. Goodput counts whole answers that ended after the first fifth, when the queue
has filled. What follows `--` goes to `kvist serve`; without it, its defaults.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass

import uvloop

from benchmarks.gateway.load import PATH, drive
from benchmarks.gateway.peers import PROXIES
from benchmarks.gateway.processes import Child, start_workers
from kvist.http.client import Fetch, Header, Pool

BODY = b'{"model":"fake","messages":[{"role":"user","content":"%08d ' + b"x" * 2000 + b'"}]}'
QUIET = 20.0  # seconds in which what is left may end


class Call(Fetch):
    """Keeps whether a refusal says when to come back."""

    retry_after = False

    def response_head(self, status: int, headers: list[Header], body: bytes) -> None:
        self.retry_after = any(name == b"retry-after" for name, _ in headers)
        super().response_head(status, headers, body)


@dataclass(slots=True)
class Found:
    """capacity and goodput in requests/s; refused by status; odd: anything else; rss in bytes."""

    capacity: float
    offered: float
    goodput: float
    served: int
    refused: dict[str, int]
    odd: dict[str, int]
    latency_p50: float
    latency_p99: float
    rss_before: int
    rss_most: int
    rss_after: int

    @property
    def share(self) -> float:
        return self.goodput / self.capacity


async def _load(
    url: str, rate: float, seconds: float, gateway: Child
) -> tuple[Counter[str], list[tuple[float, float]], int]:
    """Counts by outcome, (end, latency) of each whole answer, and the most memory seen."""
    pool = Pool(url, keep=100_000)
    counts, whole, most = Counter[str](), [], 0

    async def one(number: int) -> None:
        start = time.monotonic()
        call = Call()
        body = BODY % number
        head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % PATH.encode()
        try:
            connection = pool.take() or await pool.connect(10)
            connection.send(call, head + b"content-length: %d\r\n\r\n" % len(body) + body)
            async with asyncio.timeout(120):
                status, _ = await call.done
        except (OSError, TimeoutError) as error:
            counts[type(error).__name__] += 1
            return
        if status == 200:
            whole.append((time.monotonic(), time.monotonic() - start))
        counts[f"{status}" + (" without retry-after" * (status in (429, 503) and not call.retry_after))] += 1

    begin, number, tasks = time.monotonic(), 0, set()
    while (now := time.monotonic() - begin) < seconds:
        while number < now * rate:
            task = asyncio.create_task(one(number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            if number % 500 == 0:
                most = max(most, gateway.rss())
        await asyncio.sleep(0.002)
    counts["offered"] = number
    with suppress(TimeoutError):
        async with asyncio.timeout(QUIET):
            while tasks:
                most = max(most, gateway.rss())
                await asyncio.sleep(0.2)
    counts["hanging"] = len(tasks)
    pool.close()
    return counts, whole, most


def run(times: float, seconds: float, slots: int, options: list[str]) -> Found:
    """Raises RuntimeError if a process does not start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    with ExitStack() as stack:
        workers, urls = start_workers(4, "--capacity", str(slots))
        stack.callback(workers.stop)
        proxy = PROXIES["kvist"]
        gateway, url = proxy.start(proxy.program(), urls, options)
        stack.callback(gateway.stop)
        capacity = drive("own", url, 2 * slots, max(seconds / 6, 2), 2048, False, 1).rate
        before = gateway.rss()
        begin = time.monotonic()
        counts, whole, most = uvloop.run(_load(url, times * capacity, seconds, gateway))
        after = gateway.rss()
    edge = (begin + seconds / 5, begin + seconds)
    steady = sum(edge[0] <= end < edge[1] for end, _ in whole)
    latencies = sorted(latency for _, latency in whole) or [0.0]
    offered = counts.pop("offered")
    served = counts.pop("200", 0)
    refused = {key: n for key, n in counts.items() if key in ("429", "503")}
    return Found(
        capacity=capacity,
        offered=offered / seconds,
        goodput=steady / (edge[1] - edge[0]),
        served=served,
        refused=refused,
        odd={key: n for key, n in counts.items() if n and key not in refused},
        latency_p50=latencies[len(latencies) // 2],
        latency_p99=latencies[int(0.99 * len(latencies))],
        rss_before=before,
        rss_most=max(most, before),
        rss_after=after,
    )


def main() -> int:
    words = [*sys.argv[1:], "--"]
    own, options = words[: words.index("--")], words[words.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=float, default=3, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--slots", type=int, default=20, help="requests the workers serve at once")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(own)
    found = run(args.times, args.seconds, args.slots, options)
    if args.json:
        print(json.dumps({**asdict(found), "goodput_over_capacity": found.share}))
        return 0
    mib = 2**20
    print(f"capacity {found.capacity:,.0f} requests/s; offered {found.offered:,.0f} for {args.seconds:g} s")
    print(f"goodput  {found.goodput:,.0f} requests/s, {found.share:.1%} of capacity; served {found.served:,}")
    print(f"latency of the served: p50 {found.latency_p50:.2f} s, p99 {found.latency_p99:.2f} s")
    print(f"refused with Retry-After: {found.refused or 'none'}; anything else: {found.odd or 'none'}")
    print(
        f"gateway memory: {found.rss_before / mib:.0f} MiB before, {found.rss_most / mib:.0f} at most, "
        f"{found.rss_after / mib:.0f} after"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
