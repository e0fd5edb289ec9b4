"""A request inside an engine, what one step did to requests, and the engine's counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvist.cache import Match
from kvist.model import Query


class State(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class Refused(ValueError):
    """The engine can never serve this request; the text says why."""


@dataclass(slots=True, eq=False)
class Request:
    """A query inside an engine. Times are the host's, in seconds; None until they happen.

    cached: prompt tokens found in the cache at first admission, -1 before. `tag` is the host's own.
    """

    query: Query
    submitted: float
    tag: Any = None
    state: State = State.WAITING
    aborted: bool = False
    cached: int = -1
    generated: int = 0  # output tokens, as of the last change of state; see Engine.generated
    preempted: int = 0  # times
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    match: Match | None = None  # locked while running
    computed: int = 0  # prompt (and recomputed output) tokens with KV
    reserved: int = 0  # own blocks outside the tree, as of the start of decoding
    joined: int = 0  # step count when decoding began


@dataclass(slots=True)
class StepResult:
    """Which requests got their first token in a step, which ended.

    `decoded` lists those that got a later token; it is filled only by an engine made with stream=True.
    """

    first: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    decoded: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, in tokens, events and seconds, after vLLM's metrics.

    prompt_tokens and hit_tokens count each request once, at its first admission (vllm:prefix_cache_queries
    and _hits). computed_tokens: prompt tokens computed, recomputation included.
    """

    prompt_tokens: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    refused: int = 0
    preemptions: int = 0
    steps: int = 0
    busy: float = 0.0
