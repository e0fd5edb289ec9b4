"""The exchange of shares over Redis: asynchronous, bounded, beside the path of requests.

Each gateway writes its share under a key that expires, and reads those of the gateways that wrote of late:

    kvist:{FLEET}:share:GATEWAY      its share, for a few intervals
    kvist:{FLEET}:learned:GATEWAY    what its policy has learned, for ten minutes
    kvist:{FLEET}:gateways           sorted set: gateway -> when it last wrote, Unix seconds

If Redis is slow, full or gone, the peers' figures fade out and the gateway goes on with its own; it tries
again with growing pauses. A gateway that starts takes over what the best informed peer has learned. The
clocks of gateways need not agree: they only decide who is listed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvist.gateway.settings import Settings
from kvist.gateway.sharing.fleet import SharedFleet
from kvist.gateway.sharing.share import MOST_BYTES, MOST_PEERS, decode, encode
from kvist.routing import Router

FRESH_INTERVALS = 5  # that a share counts for
LISTED = 3600.0  # seconds that a silent gateway stays in the list
LEARNED_EVERY = 30.0  # seconds between writes of what was learned
LEARNED_FOR = 600  # seconds that it is kept
LONGEST_PAUSE = 5.0  # seconds between attempts
TIMEOUT = 2.0  # seconds for one exchange


def over_redis(settings: Settings, router: Router, log: Callable[..., None]) -> RedisExchange | None:
    """The exchange that the settings ask for, under a name of its own; None if they ask for none."""
    if not settings.share_url:
        return None
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    shared = SharedFleet(router, name, time.time_ns(), FRESH_INTERVALS * settings.share_interval)
    return RedisExchange(
        shared,
        settings.share_url,
        fleet=settings.share_fleet,
        interval=settings.share_interval,
        log=log,
    )


class RedisExchange:
    """url: redis://, rediss:// or unix://. interval: seconds. Raises ValueError without the extra, and for
    a malformed URL."""

    def __init__(
        self,
        shared: SharedFleet,
        url: str,
        *,
        fleet: str = "default",
        interval: float = 0.2,
        log: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        try:
            from redis.asyncio import Redis
        except ModuleNotFoundError:
            raise ValueError("sharing over Redis needs its client: pip install 'kvist[redis]'") from None
        try:
            self._redis: Any = Redis.from_url(
                url,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                retry=None,
                retry_on_error=None,
            )
        except ValueError as error:
            raise ValueError(f"share_url {url!r}: {error}") from None
        self.shared = shared
        self.interval = interval
        self.log = log
        self.connected = False
        self.peers = 0
        self.refused = 0  # shares that were malformed or of another version
        self._prefix = f"kvist:{{{fleet}}}:"
        self._known: list[str] = []
        self._told = -LEARNED_EVERY
        self._asked = False

    async def run(self) -> None:
        """Exchange until cancelled; raises nothing else."""
        pause = self.interval
        try:
            while True:
                try:
                    async with asyncio.timeout(TIMEOUT):
                        await self._exchange()
                except Exception as error:  # whatever it is, traffic goes on
                    if self.connected or pause == self.interval:
                        self.log("sharing lost: learning alone", error=str(error) or type(error).__name__)
                    self.connected = False
                    pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    if not self.connected:
                        self.log("sharing", peers=self.peers)
                    self.connected = True
                    pause = self.interval
                before, self.peers = self.peers, self.shared.refresh(time.monotonic())
                if self.peers != before:
                    self.log("peers", count=self.peers)
                await self._wait(pause)
        finally:
            with contextlib.suppress(Exception):
                await self._redis.aclose()

    async def _wait(self, pause: float) -> None:
        """Sleep; while Redis is away, let stale shares fade at the interval all the same."""
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self.interval))
            if not self.connected:
                self.peers = self.shared.refresh(time.monotonic())

    async def _exchange(self) -> None:
        """One round trip: write the own share, read the others'."""
        own, now = self.shared.own(), time.time()
        data = encode(own)
        keep = max(int(FRESH_INTERVALS * self.interval * 1000), 1000)
        pipe = self._redis.pipeline(transaction=False)
        if len(data) <= MOST_BYTES:
            pipe.set(self._prefix + "share:" + own.gateway, data, px=keep)
        pipe.zadd(self._prefix + "gateways", {own.gateway: now})
        pipe.zremrangebyscore(self._prefix + "gateways", "-inf", now - LISTED)
        pipe.zrange(self._prefix + "gateways", -MOST_PEERS, -1)
        if self._known:
            pipe.mget([self._prefix + "share:" + name for name in self._known])
        answers = await pipe.execute()
        found = answers.pop() if self._known else []
        names = [name.decode("utf-8", "replace") for name in answers.pop()]
        self._known = [name for name in names if name != own.gateway]
        shares = []
        for data in found:
            if data is None:
                continue
            share = decode(data)
            if share is None:
                self.refused += 1
            else:
                shares.append(share)
        self.shared.peers.receive(shares, time.monotonic())
        await self._exchange_learned(own.gateway)

    async def _exchange_learned(self, gateway: str) -> None:
        """Once, take over what the best informed peer learned; now and then, tell what was learned here."""
        policy = self.shared.router.policy
        if not self._asked:
            if self._known:
                keys = [self._prefix + "learned:" + name for name in self._known]
                self._adopt([data for data in await self._redis.mget(keys) if data is not None])
            self._asked = bool(self._known)
        if time.monotonic() - self._told >= LEARNED_EVERY:
            self._told = time.monotonic()
            data = msgspec.json.encode({"policy": policy.name, "state": policy.snapshot()})
            if len(data) <= MOST_BYTES:
                await self._redis.set(self._prefix + "learned:" + gateway, data, ex=LEARNED_FOR)

    def _adopt(self, learned: list[bytes]) -> None:
        policy = self.shared.router.policy
        best, most = None, observations(policy.snapshot())
        for data in learned:
            with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
                entry = msgspec.json.decode(data)
                seen = observations(entry["state"])
                if entry["policy"] == policy.name and seen > most:
                    best, most = entry["state"], seen
        if best is None:
            return
        try:
            policy.restore(best)
        except ValueError as error:
            self.log("a peer's knowledge does not fit", error=str(error))
        else:
            self.log("took over what a peer learned", observations=most)


def observations(state: Any) -> int:
    """Observations in a policy's snapshot, at whatever depth they stand."""
    if not isinstance(state, dict):
        return 0
    own = state.get("observations")
    if isinstance(own, int):
        return own
    return sum(observations(value) for value in state.values())
