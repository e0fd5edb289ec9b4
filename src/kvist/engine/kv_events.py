"""KV events on the wire as vLLM publishes them: ZeroMQ PUB, and a ROUTER that replays.

Frames: topic, 8-byte big-endian sequence number, msgpack of [timestamp, [events]]; events are maps with a
`type` (vllm/distributed/kv_events.py). Replay: a request [b"", start] is answered by [b"", topic, number,
payload] for each batch that is still kept, and ends with number -1.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import msgspec
import numpy as np

from kvist.cache.events import CacheEvent, Cleared, Removed

KEPT = 10_000  # batches


class Publisher:
    """Binds at once. Raises ValueError for an address it cannot bind, ModuleNotFoundError without zmq."""

    def __init__(self, endpoint: str, replay: str = "", topic: str = "kv-events") -> None:
        try:
            import zmq
        except ModuleNotFoundError:
            raise ModuleNotFoundError("KV events need pyzmq: pip install 'kvist[gateway]'") from None
        self._zmq = zmq
        self._topic = topic.encode()
        self._context = zmq.Context()
        self._number = 0
        self.events = 0  # that the cache has told of, published or about to be
        self.subscriptions = 0  # that reached the socket: what is published from then on is heard
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._batch: list[CacheEvent] = []
        self.socket = self._bind(zmq.XPUB, endpoint)
        self.replay = self._bind(zmq.ROUTER, replay) if replay else None

    def _bind(self, kind: int, endpoint: str) -> Any:
        socket = self._context.socket(kind)
        socket.linger = 0
        if kind == self._zmq.XPUB:  # a PUB that tells of every subscription
            socket.setsockopt(self._zmq.XPUB_VERBOSER, 1)
        try:
            socket.bind(endpoint)
        except self._zmq.ZMQError as error:
            raise ValueError(f"KV events: cannot bind {endpoint}: {error}") from None
        return socket

    def add(self, event: CacheEvent) -> None:
        """Collect an event of the step under way."""
        self._batch.append(event)
        self.events += 1

    def flush(self) -> None:
        """Publish what was collected as one batch; answer replay requests."""
        if self._batch:
            events = [encode(event) for event in self._batch]
            self._batch.clear()
            payload = msgspec.msgpack.encode([time.time(), events])
            number = self._number
            self._number += 1
            self._kept.append((number, payload))
            self.socket.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
        while self.socket.poll(0):
            self.subscriptions += 1 if self.socket.recv()[:1] == b"\x01" else -1
        self._serve_replays()

    def _serve_replays(self) -> None:
        if self.replay is None:
            return
        while self.replay.poll(0):
            frames = self.replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, start = frames[0], int.from_bytes(frames[2], "big")
            for number, payload in self._kept:
                if number >= start:
                    self.replay.send_multipart((client, b"", self._topic, number.to_bytes(8, "big"), payload))
            self.replay.send_multipart((client, b"", self._topic, (-1).to_bytes(8, "big", signed=True), b""))

    def close(self) -> None:
        self.socket.close()
        if self.replay is not None:
            self.replay.close()
        self._context.term()


def encode(event: CacheEvent) -> dict[str, Any]:
    """An event as the map that vLLM sends."""
    if isinstance(event, Removed):
        return {"type": "BlockRemoved", "block_hashes": list(event.hashes), "medium": "GPU"}
    if isinstance(event, Cleared):
        return {"type": "AllBlocksCleared"}
    salted = event.salt and event.parent is None  # as vLLM: in the first block's extra keys only
    first = [event.salt.decode("utf-8", "replace")]
    return {
        "type": "BlockStored",
        "block_hashes": list(event.hashes),
        "parent_block_hash": event.parent,
        "token_ids": np.frombuffer(event.tokens, "<u4").tolist(),
        "block_size": event.block_size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [first, *[None] * (len(event.hashes) - 1)] if salted else None,
    }
