"""Subscriptions to the KV events of workers: ZeroMQ sockets, one task for each publisher.

A publisher sends [topic, 8-byte big-endian number, payload]. A replay is asked for with [b"", first number]
on a DEALER socket and answered by [b"", topic, number, payload] (older vLLM: no topic) until number -1.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from kvist.gateway.knowledge.feed import Batch, Feed
from kvist.gateway.settings import WorkerSpec
from kvist.prefix.events import EventIndex

REPLAY_SECONDS = 5.0
HEARTBEAT_MS = 5_000  # a peer that is gone without closing is noticed after two of these
_TURN_SECONDS = 0.002  # then other work of the loop gets its turn
_END = (1 << 64) - 1  # -1


def endpoint(template: str, url: str, rank: int = 0) -> str:
    """A ZeroMQ address from `tcp://{host}:{port+1000}` (parts of the worker's URL) or a bare port.

    Data-parallel ranks publish on consecutive ports. Raises ValueError for what is no such address.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if ":" in host:
        host = f"[{host}]"
    text = f"tcp://{{host}}:{template}" if template.isdigit() else template
    text = text.replace("{host}", host)
    text = re.sub(r"\{port(\+\d+)?\}", lambda found: str(port + int(found[1] or 0)), text)
    if found := re.fullmatch(r"(tcp://[^{}*]+:)(\d+)", text):
        return f"{found[1]}{int(found[2]) + rank}"
    if re.fullmatch(r"ipc://[^{}]+", text) and not rank:
        return text
    raise ValueError(
        f"KV events: {template!r} is no address to connect to: give a port, tcp://{{host}}:5557, "
        "tcp://{host}:{port+1000} or ipc://PATH"
    )


class Turn:
    """Lets the event loop's other work go on when this has taken long enough."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    async def over(self) -> None:
        if time.monotonic() - self._since > _TURN_SECONDS:
            await asyncio.sleep(0)
            self._since = time.monotonic()


class Subscriptions:
    """All subscriptions of a gateway, by the worker's slot. Must be made inside a running event loop.

    Raises ModuleNotFoundError without pyzmq. `feeds` is where they are kept: one feed for each data-parallel
    rank. `restarted` is told the slot of an engine that started afresh.
    """

    def __init__(
        self,
        index: EventIndex,
        feeds: dict[int, list[Feed]],
        *,
        topic: str = "",
        restarted: Callable[[int], None] = lambda slot: None,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        try:
            import zmq
            import zmq.asyncio
            import zmq.utils.monitor
        except ModuleNotFoundError:
            raise ModuleNotFoundError("KV events need pyzmq: pip install 'kvist[gateway]'") from None
        self.index = index
        self.log = log
        self._zmq = zmq
        self._context = zmq.asyncio.Context()
        self._topic = topic.encode()
        self._restarted = restarted
        self.feeds = feeds
        self._tasks: dict[int, list[asyncio.Task[None]]] = {}

    def add(self, worker: WorkerSpec, slot: int) -> None:
        """Subscribe to a worker, if it names an address. Raises ValueError for a malformed one."""
        if not worker.kv_events:
            return
        ranks = range(worker.data_parallel_size)
        live = [endpoint(worker.kv_events, worker.url, rank) for rank in ranks]
        template = worker.kv_events_replay
        replay = [endpoint(template, worker.url, rank) if template else "" for rank in ranks]
        feeds = [
            Feed(self.index, slot, rank, clock=time.time, restarted=lambda: self._restarted(slot))
            for rank in ranks
        ]
        loop = asyncio.get_running_loop()
        self.feeds[slot] = feeds
        self._tasks[slot] = [
            loop.create_task(self._follow(worker.url, feed, *addresses))
            for feed, *addresses in zip(feeds, live, replay, strict=True)
        ]

    def remove(self, slot: int) -> None:
        """Unsubscribe, if there was a subscription."""
        self.feeds.pop(slot, None)
        for task in self._tasks.pop(slot, ()):
            task.cancel()

    def close(self) -> None:
        for slot in list(self._tasks):
            self.remove(slot)
        self._context.destroy(linger=0)

    async def _follow(self, url: str, feed: Feed, live: str, replay: str) -> None:
        zmq = self._zmq
        socket = self._context.socket(zmq.SUB)
        watcher = None
        try:
            socket.linger = 0
            socket.rcvhwm = 100_000
            socket.heartbeat_ivl = HEARTBEAT_MS
            socket.heartbeat_timeout = 2 * HEARTBEAT_MS
            socket.subscribe(self._topic)
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECTED)
            watcher = asyncio.get_running_loop().create_task(self._watch(url, feed, monitor))
            socket.connect(live)
            turn = Turn()
            while True:
                frames = await socket.recv_multipart()
                await turn.over()
                if len(frames) != 3 or len(frames[1]) != 8:
                    feed.counts.invalid += 1
                    continue
                number = int.from_bytes(frames[1], "big")
                start = feed.offer(number, frames[2])
                if start is not None:
                    batches = await self._replay(replay, start) if replay else []
                    for _ in feed.replayed(start, batches, number, frames[2]):
                        await turn.over()
                    self.log("kv events", worker=url, rank=feed.rank, missing=start, replayed=len(batches))
        finally:
            if watcher is not None:
                watcher.cancel()
            socket.disable_monitor()
            socket.close(linger=0)

    async def _watch(self, url: str, feed: Feed, monitor: Any) -> None:
        """A publisher whose connection is lost may come back as another engine."""
        while True:
            event = await self._zmq.utils.monitor.recv_monitor_message(monitor)
            if event["event"] == self._zmq.EVENT_DISCONNECTED:
                feed.lost()
                self.log("kv events lost", worker=url, rank=feed.rank)

    async def _replay(self, address: str, start: int) -> list[Batch]:
        """Batches from `start` on that the publisher still has; none if it does not answer in time."""
        socket = self._context.socket(self._zmq.DEALER)
        socket.linger = 0
        found: list[Batch] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPLAY_SECONDS):
                try:
                    socket.connect(address)
                    await socket.send_multipart((b"", start.to_bytes(8, "big")))
                    while True:
                        frames = await socket.recv_multipart()
                        number = int.from_bytes(frames[-2], "big") if len(frames) >= 3 else _END
                        if number == _END:
                            return found
                        found.append((number, frames[-1]))
                finally:
                    socket.close(linger=0)
        return []
