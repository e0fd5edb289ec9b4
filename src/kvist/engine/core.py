"""One worker as a step function: continuous batching, chunked prefill, prefix cache, preemption.

A model of an engine, after vLLM V1's scheduler (vllm/v1/core/sched/scheduler.py): each step decodes one token
of every running sequence, spends what is left of the token budget on prefill chunks, and admits waiting
requests while sequences, budget and KV blocks allow. When a decode finds no block, the request admitted last
is preempted and recomputed later. The latency profile turns the batch into a duration.

Pure: the host calls `begin_step(now)`, lets the returned seconds pass (virtual or real), and calls
`end_step(now)`. A decode step costs O(1) however many sequences decode: their contexts grow in lockstep, so
the sum of contexts, the blocks needed next and the steps at which requests end are kept, not recounted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvist.cache import PrefixCache
from kvist.cache.cache import Match
from kvist.engine.latency import LatencyProfile
from kvist.engine.queue import QUEUES
from kvist.model import Query


class State(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


class RequestTooLong(ValueError):
    """Prompt and output together exceed the whole KV cache: the request could never run."""


@dataclass(slots=True, eq=False)
class Request:
    """A query inside an engine. `cached` is the prompt tokens found in the cache at first admission."""

    query: Query
    submitted: float
    state: State = State.WAITING
    cached: int = -1
    generated: int = 0  # output tokens, as of the last change of state; see Engine.generated
    preempted: int = 0
    first_token: float | None = None
    match: Match | None = None  # locked while running
    computed: int = 0  # prompt (and recomputed output) tokens with KV
    reserved: int = 0  # own blocks outside the tree, as of the start of decoding
    joined: int = 0  # decode step count when decoding began


@dataclass(slots=True)
class StepResult:
    """What a step did. `decoded` requests got one more token, those in `first` their first."""

    first: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)


@dataclass(slots=True)
class EngineStats:
    """Counters since the start, in tokens and events (vLLM's vllm:prefix_cache_queries / _hits, …)."""

    prompt_tokens: int = 0
    hit_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    busy: float = 0.0


class Engine:
    """See the module. Raises ValueError for limits below 1 or an unknown queue order."""

    def __init__(
        self,
        cache: PrefixCache,
        profile: LatencyProfile,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        queue: str = "fcfs",
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        if queue not in QUEUES:
            raise ValueError(f"unknown queue order {queue!r}: choose one of {', '.join(QUEUES)}")
        self.cache = cache
        self.profile = profile
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.stats = EngineStats()
        self._order = QUEUES[queue]
        self.waiting: list[Request] = []
        self.running: dict[Request, None] = {}  # in order of admission
        self._prefilling: list[Request] = []
        self._ending: list[Request] = []  # prefills that complete with the step under way
        self._stepping = False
        # Decoding sequences, all together.
        self._tick = 0  # decode steps done
        self._decodes = 0
        self._decode_kv = 0  # sum of contexts
        self._needs = [
            0
        ] * cache.block_size  # sequences by the residue of the tick at which they need a block
        self._ends: dict[int, list[Request]] = {}  # tick -> sequences that then have all their tokens

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that running requests hold, 0 … 1 (vllm:kv_cache_usage_perc)."""
        return (self.cache.tree.locked + self.cache.reserved_blocks) / self.cache.capacity_blocks

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def generated(self, request: Request) -> int:
        """Output tokens of a request so far."""
        if request.state is State.DECODE:
            return request.generated + self._tick - request.joined
        return request.generated

    def submit(self, query: Query, now: float) -> Request:
        """Queue a query. Raises RequestTooLong if it could never run."""
        need = self._blocks(query.length + query.output_tokens)
        if need > self.cache.capacity_blocks:
            raise RequestTooLong(
                f"prompt and output of {query.length} + {query.output_tokens} tokens exceed the KV cache of "
                f"{self.cache.capacity} tokens"
            )
        if query.output_tokens < 1:
            raise ValueError(f"output_tokens must be at least 1, not {query.output_tokens}")
        request = Request(query, now)
        self.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """The client left: drop the request wherever it is. Does nothing for one that is done."""
        if request.state is State.WAITING:
            self.waiting.remove(request)
        elif request.state is not State.DONE:
            self._stop(request)
        request.state = State.DONE

    def begin_step(self, now: float) -> float | None:
        """Schedule one step; its duration in seconds, or None if there is nothing to do."""
        if self.idle:
            return None
        self._reserve_decodes()
        decodes, decode_kv = self._decodes, self._decode_kv + self._decodes
        budget = self.max_num_batched_tokens - decodes
        tokens, work = decodes, 0.0
        prefilling = self._prefilling
        position = 0
        while budget > 0:
            if position == len(prefilling) and not (self.waiting and self._admit(now)):
                break
            request = prefilling[position]
            left = request.query.length + request.generated - request.computed
            chunk = left if left < budget else budget
            work += chunk * (request.computed + chunk / 2)
            request.computed += chunk
            budget -= chunk
            tokens += chunk
            position += 1
            if chunk == left:
                self._ending.append(request)
                self._insert_prompt(request, now)
        if not tokens:
            return None
        if self._ending:
            ending = set(self._ending)
            self._prefilling = [request for request in prefilling if request not in ending]
        duration = self.profile.step(tokens, work, decode_kv, decodes)
        self.stats.steps += 1
        self.stats.busy += duration
        return duration

    def end_step(self, now: float) -> StepResult:
        """The step is over: tokens are out, requests that have all of theirs end."""
        result = StepResult()
        self._tick += 1
        self._decode_kv += self._decodes
        self.stats.output_tokens += self._decodes
        for request in self._ends.pop(self._tick, ()):
            if request.state is State.DECODE and request.joined + self._left(request) == self._tick:
                self._finish(request, now)
                result.finished.append(request)
        for request in self._ending:
            if request.state is not State.PREFILL:
                continue  # aborted meanwhile
            request.generated += 1
            self.stats.output_tokens += 1
            if request.first_token is None:
                request.first_token = now
                result.first.append(request)
            if request.generated >= request.query.output_tokens:
                self._finish(request, now)
                result.finished.append(request)
            else:
                self._start_decoding(request)
        self._ending = []
        return result

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _left(self, request: Request) -> int:
        """Decode steps of a request from when it joined to its last token."""
        return request.query.output_tokens - request.generated

    def _admit(self, now: float) -> bool:
        """Start the next waiting request, if sequences and blocks allow."""
        if len(self.running) >= self.max_num_seqs:
            return False
        self._order(self.waiting, self, now)
        request = self.waiting[0]
        query, cache = request.query, self.cache
        total = query.length + request.generated
        # vLLM computes at least the last prompt token, whatever is cached.
        most = (total - 1) // cache.block_size * cache.block_size
        hit, unlocked = cache.probe(query.prompt, query.salt)
        need = self._blocks(total) - min(hit, most) // cache.block_size
        if need > cache.free_blocks + cache.tree.total - cache.tree.locked - unlocked:
            return False
        match = cache.match(query.prompt, now, query.salt, query)
        cache.lock(match.node)
        reserved = cache.reserve(need)
        assert reserved, "probe promised the room"
        self.waiting.pop(0)
        hit = min(match.length, most)
        if request.cached < 0:
            request.cached = hit
            self.stats.prompt_tokens += query.length
            self.stats.hit_tokens += hit
        request.state = State.PREFILL
        request.match, request.computed, request.reserved = match, hit, need
        self.running[request] = None
        self._prefilling.append(request)
        return True

    def _insert_prompt(self, request: Request, now: float) -> None:
        """The prompt's blocks are computed in this step: later requests of the same step may use them."""
        query, cache = request.query, self.cache
        assert request.match is not None
        inserted = cache.insert(query.prompt, now, query.salt, below=request.match)
        cache.lock(inserted.node)
        cache.unlock(request.match.node)
        whole = query.length // cache.block_size
        request.match = Match(inserted.node, whole * cache.block_size)
        own = self._blocks(query.length + request.generated) - whole
        cache.release(request.reserved - inserted.new_blocks - own)  # what another request cached meanwhile
        request.reserved = own

    def _start_decoding(self, request: Request) -> None:
        request.state = State.DECODE
        request.joined = self._tick
        context = request.query.length + request.generated - 1
        self._decodes += 1
        self._decode_kv += context
        self._needs[(context - self._tick) % self.cache.block_size] += 1
        self._ends.setdefault(self._tick + self._left(request), []).append(request)

    def _reserve_decodes(self) -> None:
        """Take the blocks into which the step's decodes write; preempt the last admitted if there is none."""
        while self._decodes:
            need = self._needs[-self._tick % self.cache.block_size]
            if not need or self.cache.reserve(need):
                return
            self._preempt(next(reversed(self.running)))

    def _preempt(self, request: Request) -> None:
        self.stats.preemptions += 1
        self._stop(request)
        request.state = State.WAITING
        request.preempted += 1
        self.waiting.insert(0, request)

    def _stop(self, request: Request) -> None:
        """Take a running request off the batch and give its blocks back; computed work is lost."""
        del self.running[request]
        if request.state is State.DECODE:
            request.generated = self._leave_decoding(request)
        elif request in self._prefilling:
            self._prefilling.remove(request)
        assert request.match is not None
        self.cache.release(request.reserved)
        self.cache.unlock(request.match.node)
        request.match, request.reserved, request.computed = None, 0, 0

    def _leave_decoding(self, request: Request) -> int:
        """Take a sequence out of the common sums; its output tokens so far."""
        done = self._tick - request.joined
        context = request.query.length + request.generated - 1
        self._decodes -= 1
        self._decode_kv -= context + done
        self._needs[(context - request.joined) % self.cache.block_size] -= 1
        request.reserved += self._blocks(context + done) - self._blocks(context)
        return request.generated + done

    def _finish(self, request: Request, now: float) -> None:
        """All tokens are out: cache what is known of the sequence, free the rest."""
        query, cache = request.query, self.cache
        if request.state is State.DECODE:
            request.generated = self._leave_decoding(request)
        assert request.match is not None
        # The last token's KV was never computed.
        known = query.prompt + query.answer[: (request.generated - 1) * query.unit]
        inserted = cache.insert(known, now, query.salt, below=request.match)
        cache.release(request.reserved - inserted.new_blocks)
        cache.unlock(request.match.node)
        del self.running[request]
        request.state, request.match, request.reserved = State.DONE, None, 0
