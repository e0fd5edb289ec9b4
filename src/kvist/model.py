"""The unified model of KV-cache-aware load balancing, in the paper's notation (section 1).

M workers; worker i caches at most B_i tokens and carries a queue load P_i. Queries q_1 … q_N arrive
online. h_ij is the longest prefix of q_j that worker i holds when q_j is routed. Serving q_j on i costs

    Cost_ij = a_cached * h_ij + a_miss * (|q_j| - h_ij) + O_ij

and adds as much to P_i. The objective is the makespan, max_i P_i after the last query.

A prompt is kept as packed bytes, `unit` bytes for one token (4: little-endian uint32 token ids; 1: UTF-8
text, where one byte stands for one token), so that comparing two prefixes is one memcmp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

TOKEN_BYTES = 4


def pack(token_ids: Iterable[int] | np.ndarray) -> bytes:
    """Token ids (0 … 2**32 - 1) as packed little-endian uint32, 4 bytes a token."""
    if not isinstance(token_ids, np.ndarray):
        token_ids = np.fromiter(token_ids, dtype=np.uint32)
    return token_ids.astype("<u4", copy=False).tobytes()


def unpack(prompt: bytes) -> np.ndarray:
    """The token ids of a packed prompt, a read-only uint32 array of shape (tokens,)."""
    return np.frombuffer(prompt, dtype="<u4")


@dataclass(slots=True, eq=False)
class Query:
    """One request. Times are in seconds, lengths in tokens.

    `answer` are the packed token ids of the reply where a workload knows them (a later turn resends them);
    an engine caches prompt + answer. Without them the output's KV is freed when the request ends.
    `salt` isolates prefixes: those of different salts never match. `session` names the conversation.
    """

    id: int | str
    prompt: bytes
    output_tokens: int = 1
    arrival: float = 0.0
    unit: int = TOKEN_BYTES
    salt: bytes = b""
    answer: bytes = b""
    session: str = ""
    tenant: str = ""
    model: str = ""
    priority: int = 0
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.prompt) // self.unit


@dataclass(frozen=True, slots=True)
class Cost:
    """Service-time coefficients of one worker: seconds per cached, per uncached and per output token."""

    cached: float
    miss: float
    output: float = 0.0
    fixed: float = 0.0

    def service(self, length: int, hit: int, output_tokens: int = 0) -> float:
        """Cost_ij in seconds for a prompt of `length` tokens of which `hit` are cached."""
        return self.cached * hit + self.miss * (length - hit) + self.output * output_tokens + self.fixed


@dataclass(slots=True)
class WorkerState:
    """Cache and queue of worker i as the model sees them: what a router knows, not what the engine knows.

    capacity: B_i in tokens (0: unknown). load: P_i, seconds of work routed and not yet done, as the policy
    counts it. The in-flight figures cover requests routed here and not yet ended.
    """

    id: str
    slot: int = 0
    capacity: int = 0
    draining: bool = False
    in_flight: int = 0
    in_flight_tokens: int = 0  # prompt + output tokens of requests in flight
    waiting: int = 0  # requests in flight that are still before their first token
    pending_prefill: int = 0  # uncached prompt tokens of requests still before their first token
    others: int = 0  # requests there that were not routed here, by the worker's latest metrics
    load: float = 0.0
    load_elsewhere: float = 0.0  # the same, of other routers of the fleet that tell
    routed: int = 0
    cached_tokens: int = 0  # tokens the router's index believes this worker holds

    @property
    def requests(self) -> int:
        """All requests on the worker, as far as is known."""
        return self.in_flight + self.others


def makespan(loads: Sequence[float]) -> float:
    """max_i P_i; 0 without workers."""
    return max(loads, default=0.0)
