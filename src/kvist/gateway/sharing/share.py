"""A gateway's share and the sum over its peers'. Pure: time is handed in.

The state is a map from gateway to its newest share, by (epoch, sequence); two such maps merge by taking
the newer entry of each gateway. That is a join: associative, commutative and idempotent (a state-based CRDT,
Shapiro et al. 2011), so shares may be lost, repeated and reordered.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

import msgspec

VERSION = 1
MOST_PEERS = 64
MOST_BYTES = 1 << 20  # of one share; a worker takes about 60


class WorkerShare(msgspec.Struct, array_like=True, frozen=True):
    """What one gateway has under way on one worker; units as in `kvist.model.WorkerState`."""

    in_flight: int = 0
    in_flight_tokens: int = 0
    waiting: int = 0
    pending_prefill: int = 0
    load: float = 0.0  # in the unit of the gateway's policy

    def __add__(self, other: WorkerShare) -> WorkerShare:
        return WorkerShare(
            self.in_flight + other.in_flight,
            self.in_flight_tokens + other.in_flight_tokens,
            self.waiting + other.waiting,
            self.pending_prefill + other.pending_prefill,
            self.load + other.load,
        )

    def __sub__(self, other: WorkerShare) -> WorkerShare:
        return WorkerShare(
            self.in_flight - other.in_flight,
            self.in_flight_tokens - other.in_flight_tokens,
            self.waiting - other.waiting,
            self.pending_prefill - other.pending_prefill,
            self.load - other.load,
        )

    @property
    def possible(self) -> bool:
        """All of it at least 0 and finite."""
        return min(self.in_flight, self.in_flight_tokens, self.pending_prefill) >= 0 and 0 <= self.load < inf


NOTHING = WorkerShare()


class Share(msgspec.Struct, frozen=True):
    """epoch: larger after each start of the gateway; sequence: larger with each share of an epoch."""

    gateway: str
    epoch: int
    sequence: int
    policy: str
    workers: dict[str, WorkerShare]
    version: int = VERSION

    @property
    def age(self) -> tuple[int, int]:
        return self.epoch, self.sequence


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Share)


def encode(share: Share) -> bytes:
    return _encoder.encode(share)


def decode(data: bytes) -> Share | None:
    """None for what is too large, malformed, impossible or of another version."""
    if len(data) > MOST_BYTES:
        return None
    try:
        share = _decoder.decode(data)
    except msgspec.DecodeError:  # ValidationError is one
        return None
    if share.version != VERSION or not all(worker.possible for worker in share.workers.values()):
        return None
    return share


class Peers:
    """The newest share of every other gateway. fresh_for: seconds that one counts after it was first seen."""

    def __init__(self, own: str, fresh_for: float) -> None:
        if not 0 < fresh_for < inf:
            raise ValueError(f"fresh_for must be above 0 seconds, not {fresh_for}")
        self.own = own
        self.fresh_for = fresh_for
        self._newest: dict[str, tuple[Share, float]] = {}

    def receive(self, shares: Iterable[Share], now: float) -> None:
        """Keep what is newer than what is known; a share seen again is not fresher for it."""
        for share in shares:
            known = self._newest.get(share.gateway)
            if share.gateway != self.own and (known is None or share.age > known[0].age):
                self._newest[share.gateway] = share, now
        if len(self._newest) > MOST_PEERS:
            oldest = sorted(self._newest, key=lambda name: self._newest[name][1])
            for name in oldest[: len(self._newest) - MOST_PEERS]:
                del self._newest[name]

    def fresh(self, now: float) -> list[Share]:
        return [share for share, seen in self._newest.values() if now - seen <= self.fresh_for]

    def total(self, policy: str, now: float) -> dict[str, WorkerShare]:
        """Sum of the fresh shares by worker. Loads of another policy have another unit and are left out."""
        total: dict[str, WorkerShare] = {}
        for share in self.fresh(now):
            for worker, part in share.workers.items():
                if share.policy != policy:
                    part = msgspec.structs.replace(part, load=0.0)
                total[worker] = total.get(worker, NOTHING) + part
        return total
