"""A slow, obvious engine: every sequence is counted on its own in every step."""

from __future__ import annotations

from kvist.cache import Match, PrefixCache
from kvist.engine.latency import LatencyProfile
from kvist.engine.request import Request, State
from kvist.model import Query


class NaiveEngine:
    """First come, first served; no kept sums, no shortcuts. Block tables are plain counts per request."""

    def __init__(self, cache: PrefixCache, profile: LatencyProfile, seqs: int, budget: int) -> None:
        self.cache, self.profile, self.seqs, self.budget = cache, profile, seqs, budget
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.completing: list[Request] = []
        self.decoding: list[Request] = []
        self.steps = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, query: Query, now: float) -> Request:
        request = Request(query, now)
        self.waiting.append(request)
        return request

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def own(self, request: Request) -> int:
        """Blocks a running request needs outside the tree for what it has computed."""
        assert request.match is not None
        return self.blocks(request.computed) - request.match.length // self.cache.block_size

    def begin_steps(self, now: float, until: float = 0.0) -> float | None:
        if self.idle:
            return None
        cache = self.cache
        preempted = False
        while True:
            self.decoding = [r for r in self.running if r.state is State.DECODE]
            need = sum(r.computed % cache.block_size == 0 for r in self.decoding)
            if cache.reserve(need):
                break
            self.preempt(self.running[-1])
            preempted = True
        kv = 0
        for request in self.decoding:
            request.computed += 1
            request.reserved = self.own(request)
            kv += request.computed
        budget = self.budget - len(self.decoding)
        chunked, work = 0, 0.0
        queue = [r for r in self.running if r.state is State.PREFILL]
        while budget:
            if not queue:
                request = None if preempted else self.admit(now)
                if request is None:
                    break
                queue.append(request)
            request = queue.pop(0)
            total = request.query.length + request.generated
            chunk = min(total - request.computed, budget)
            work += chunk * (request.computed + chunk / 2)
            request.computed += chunk
            budget -= chunk
            chunked += chunk
            if request.computed == total:
                self.completing.append(request)
                self.store(request, request.query.prompt, now)
        self.steps += 1
        decodes = len(self.decoding)
        return now + self.profile.step(chunked + decodes, work, kv, decodes)

    def end_step(self, now: float) -> None:
        for request in self.decoding:
            request.generated += 1
            self.maybe_finish(request, now)
        for request in self.completing:
            request.generated += 1
            request.state = State.DECODE
            if request.first_token is None:
                request.first_token = now
            self.maybe_finish(request, now)
        self.completing = []

    def admit(self, now: float) -> Request | None:
        if not self.waiting or len(self.running) == self.seqs:
            return None
        request, cache = self.waiting[0], self.cache
        query = request.query
        total = query.length + request.generated
        cached, unlocked = cache.probe(query.prompt)
        need = self.blocks(total) - cached // cache.block_size
        if need > cache.free_blocks + (cache.evictable // cache.block_size) - unlocked:
            return None
        self.waiting.pop(0)
        match = cache.match(query.prompt, now, b"", query)
        cache.lock(match.node)
        assert cache.reserve(need)
        request.match, request.reserved, request.state = match, need, State.PREFILL
        request.computed = min(match.length, (total - 1) // cache.block_size * cache.block_size)
        if request.cached < 0:
            request.cached = request.computed
        self.running.append(request)
        return request

    def store(self, request: Request, tokens: bytes, now: float) -> None:
        """Cache whole blocks, lock them, and keep no more reserved than the rest needs."""
        cache = self.cache
        assert request.match is not None
        inserted = cache.insert(tokens, now, below=request.match)
        cache.lock(inserted.node)
        cache.unlock(request.match.node)
        whole = len(tokens) // 4 // cache.block_size
        request.match = Match(inserted.node, whole * cache.block_size)
        left = self.own(request)
        cache.release(request.reserved - inserted.new_blocks - left)
        request.reserved = left

    def maybe_finish(self, request: Request, now: float) -> None:
        query = request.query
        if request.generated < query.output_tokens:
            return
        if query.answer:
            self.store(request, query.prompt + query.answer[: (request.generated - 1) * 4], now)
        self.leave(request)
        request.state, request.finished = State.DONE, now

    def leave(self, request: Request) -> None:
        assert request.match is not None
        self.running.remove(request)
        self.cache.release(request.reserved)
        self.cache.unlock(request.match.node)
        request.match, request.reserved = None, 0

    def preempt(self, request: Request) -> None:
        self.leave(request)
        request.state, request.computed = State.WAITING, 0
        request.preempted += 1
        self.waiting.insert(0, request)
