"""One worker as a step function: continuous batching, chunked prefill, prefix cache, preemption.

A model of an engine, after vLLM V1's scheduler (vllm/v1/core/sched/scheduler.py): each step decodes one token
of every running sequence, spends what is left of the token budget on prefill chunks, and admits waiting
requests while sequences, budget and KV blocks allow; a request is admitted only if its whole prompt fits.
When a decode finds no block, the request admitted last is preempted and recomputed later, and nothing is
admitted in that step. The latency profile turns the batch into a duration.

Pure: the host calls `begin_step(now)`, lets the returned seconds pass (virtual or real), and calls
`end_step(now)`; between the two it may submit and abort. A decode step costs O(1) however many sequences
decode: their contexts grow in lockstep, so the sum of contexts, the blocks needed next and the steps at which
requests end are kept, not recounted.
"""

from __future__ import annotations

from collections import deque
from math import inf

from kvist.cache import Match, PrefixCache
from kvist.engine.latency import LatencyProfile
from kvist.engine.order import QueueOrder, make_order
from kvist.engine.request import EngineStats, Refused, Request, State, StepResult
from kvist.model import Query


class Engine:
    """See the module. queue: an order of `kvist.engine.order`, by name or as an object.

    stream: fill StepResult.decoded, which costs O(running) a step. Raises ValueError for limits that cannot
    work and for an unknown queue order.
    """

    def __init__(
        self,
        cache: PrefixCache,
        profile: LatencyProfile,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        queue: str | QueueOrder = "fcfs",
        stream: bool = False,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must be at least max_num_seqs "
                f"({max_num_seqs}): a step decodes one token of each running request"
            )
        self.cache = cache
        self.profile = profile
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.queue = make_order(queue) if isinstance(queue, str) else queue
        self.stream = stream
        self.stats = EngineStats()
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}  # in order of admission
        self._prefilling: list[Request] = []
        self._ending: list[Request] = []  # prefills that complete with the step under way
        self.stepping = False  # between begin_step and end_step
        self._blocked = False  # the next waiting request did not fit, and nothing has changed since
        # Decoding sequences, all together.
        self._tick = 0  # steps done
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
        """Queue a query. Raises Refused if it is empty or could never run."""
        problem = self._problem(query)
        if problem:
            self.stats.refused += 1
            raise Refused(problem)
        request = Request(query, now)
        self.waiting.append(request)
        if self.queue.reorders:
            self._blocked = False
        return request

    def abort(self, request: Request) -> bool:
        """The client left: drop the request wherever it is. False if it is done already."""
        if request.state is State.DONE:
            return False
        if request.state is State.WAITING:
            self.waiting.remove(request)
            self._blocked = False
        else:
            self._stop(request)
        request.state = State.DONE
        request.aborted = True
        self.stats.aborted += 1
        return True

    def begin_step(self, now: float) -> float | None:
        """Schedule one step; its duration in seconds, or None if there is nothing to do."""
        end = self.begin_steps(now)
        return None if end is None else end - now

    def begin_steps(self, now: float, until: float = -inf) -> float | None:
        """Schedule a step; when it ends, or None if there is nothing to do.

        Where nothing but decoding can happen, the steps that begin before `until` are taken at once, up to
        one that ends a request, with the same result as one by one. The host promises not to submit or abort
        before `until`. Raises ValueError while a step is under way.
        """
        if self.stepping:
            raise ValueError("begin_step before the end_step of the step under way")
        if not self.running and not self.waiting:
            return None
        admitting = self._reserve_decodes() and not self._blocked
        decodes = self._decodes
        budget = self.max_num_batched_tokens - decodes
        chunked, work = 0, 0.0
        prefilling = self._prefilling
        position = 0
        while budget > 0:
            if position == len(prefilling) and not (admitting and self.waiting and self._admit(now)):
                break
            request = prefilling[position]
            left = request.query.length + request.generated - request.computed
            chunk = left if left < budget else budget
            work += chunk * (request.computed + chunk / 2)
            request.computed += chunk
            budget -= chunk
            chunked += chunk
            position += 1
            if chunk == left:
                self._ending.append(request)
                self._insert_prompt(request, now)
        if self._ending:
            self._prefilling = prefilling[len(self._ending) :]  # prompts complete in order
        assert chunked or decodes, "with nothing running, the next request fits"
        kv = self._decode_kv + decodes
        end = now + self.profile.step(chunked + decodes, work, kv, decodes)
        self.stepping = True
        stats = self.stats
        stats.steps += 1
        if chunked:
            stats.computed_tokens += chunked
        elif end < until and (not self.waiting or self._blocked or len(self.running) >= self.max_num_seqs):
            end = self._decode_on(end, until)
        stats.busy += end - now
        return end

    def end_step(self, now: float) -> StepResult:
        """The step is over: tokens are out, requests that have all of theirs end."""
        result = StepResult()
        self.stepping = False
        if self.stream:
            result.decoded = [request for request in self.running if request.state is State.DECODE]
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
            elif self.stream:
                result.decoded.append(request)
            if request.generated >= request.query.output_tokens:
                self._finish(request, now)
                result.finished.append(request)
            else:
                self._start_decoding(request)
        self._ending = []
        return result

    def _problem(self, query: Query) -> str:
        """Why a query can never run here; empty if it can."""
        cache = self.cache
        unit = cache.stride // cache.block_size
        if query.unit != unit:
            return f"the prompt has {query.unit} bytes a token, this engine's cache takes {unit}"
        if query.length < 1:
            return "the prompt is empty"
        if query.output_tokens < 1:
            return f"output_tokens must be at least 1, not {query.output_tokens}"
        if self._blocks(query.length + query.output_tokens - 1) > cache.capacity_blocks:
            return (
                f"prompt and output of {query.length} + {query.output_tokens} tokens exceed the KV cache of "
                f"{cache.capacity} tokens"
            )
        return ""

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _left(self, request: Request) -> int:
        """Decode steps of a request from when it joined to its last token."""
        return request.query.output_tokens - request.generated

    def _decode_on(self, end: float, until: float) -> float:
        """Further decode steps after the one under way; the end of the last, which stays under way."""
        step, decodes, needs, ends = self.profile.step, self._decodes, self._needs, self._ends
        stats, cache, size = self.stats, self.cache, self.cache.block_size
        steps = 0
        while end < until and self._tick + 1 not in ends:
            need = needs[-(self._tick + 1) % size]
            if need and not cache.reserve(need):
                break
            self._tick += 1
            self._decode_kv += decodes
            end += step(decodes, 0.0, self._decode_kv + decodes, decodes)
            steps += 1
        stats.steps += steps
        stats.output_tokens += steps * decodes
        return end

    def _admit(self, now: float) -> bool:
        """Start the next waiting request, if sequences and blocks allow."""
        if len(self.running) >= self.max_num_seqs:
            return False
        waiting, cache = self.waiting, self.cache
        position = 0 if waiting[0].preempted else self.queue.pick(self, now)
        request = waiting[position]
        query = request.query
        total = query.length + request.generated
        blocks = self._blocks(total)
        if not self._fits(query, blocks):
            self._blocked = True
            return False
        del waiting[position]
        match = cache.match(query.prompt, now, query.salt, query)
        cache.lock(match.node)
        need = blocks - match.length // cache.block_size
        reserved = cache.reserve(need)
        assert reserved, "what fits can be reserved"
        # vLLM computes at least the last token of the prompt, whatever is cached.
        hit = min(match.length, (total - 1) // cache.block_size * cache.block_size)
        if request.admitted is None:
            request.admitted = now
            request.cached = hit
            self.stats.prompt_tokens += query.length
            self.stats.hit_tokens += hit
        request.state = State.PREFILL
        request.match, request.computed, request.reserved = match, hit, need
        self.running[request] = None
        self._prefilling.append(request)
        return True

    def _fits(self, query: Query, blocks: int) -> bool:
        """Whether a prompt of `blocks` blocks, less those cached, can be had without preempting."""
        cache = self.cache
        room = cache.free_blocks + cache.tree.total - cache.tree.locked
        if blocks <= room:  # and what the prompt has cached leaves the room only by as much as it needs less
            return True
        hit, unlocked = cache.probe(query.prompt, query.salt)
        return blocks - hit // cache.block_size <= room - unlocked

    def _insert_prompt(self, request: Request, now: float) -> None:
        """The prompt's blocks are computed in this step: later requests of the same step may use them."""
        query, cache = request.query, self.cache
        assert request.match is not None
        inserted = cache.insert(query.prompt, now, query.salt, below=request.match)
        if inserted.node is not request.match.node:
            cache.lock(inserted.node)
            cache.unlock(request.match.node)
        whole = query.length // cache.block_size
        request.match = Match(inserted.node, whole * cache.block_size)
        own = self._blocks(query.length + request.generated) - whole
        cache.release(request.reserved - inserted.new_blocks - own)  # what another request cached meanwhile
        request.reserved = own
        self._blocked = False

    def _start_decoding(self, request: Request) -> None:
        request.state = State.DECODE
        request.joined = self._tick
        context = request.query.length + request.generated - 1
        self._decodes += 1
        self._decode_kv += context
        self._needs[(context - self._tick) % self.cache.block_size] += 1
        self._ends.setdefault(self._tick + self._left(request), []).append(request)

    def _reserve_decodes(self) -> bool:
        """Take the blocks into which the step's decodes write; preempt the last admitted if there is none.

        False if anything was preempted.
        """
        calm = True
        while self._decodes:
            need = self._needs[-self._tick % self.cache.block_size]
            if not need or self.cache.reserve(need):
                break
            self._preempt(next(reversed(self.running)))
            calm = False
        return calm

    def _preempt(self, request: Request) -> None:
        self.stats.preemptions += 1
        self._stop(request)
        request.state = State.WAITING
        request.preempted += 1
        self.waiting.appendleft(request)

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
        self._blocked = False

    def _leave_decoding(self, request: Request) -> int:
        """Take a sequence out of the common sums; its output tokens so far."""
        done = self._tick - request.joined
        context = request.query.length + request.generated - 1
        self._decodes -= 1
        self._decode_kv -= context + done
        self._needs[(context - request.joined) % self.cache.block_size] -= 1
        written = context + done + self.stepping  # the step under way has its blocks already
        request.reserved += self._blocks(written) - self._blocks(context)
        return request.generated + done

    def _finish(self, request: Request, now: float) -> None:
        """All tokens are out: cache what is known of the sequence, free the rest."""
        query, cache = request.query, self.cache
        if request.state is State.DECODE:
            request.generated = self._leave_decoding(request)
        assert request.match is not None
        held = request.reserved
        if query.answer:  # the last token's KV was never computed
            known = query.prompt + query.answer[: (request.generated - 1) * query.unit]
            held -= cache.insert(known, now, query.salt, below=request.match).new_blocks
        cache.release(held)
        cache.unlock(request.match.node)
        del self.running[request]
        request.state, request.match, request.reserved = State.DONE, None, 0
        request.finished = now
        self.stats.finished += 1
        self._blocked = False
