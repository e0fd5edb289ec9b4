"""LBGR, learning-based greedy routing (after paper section 3).

For every worker the latency of this query is predicted, and the smallest, plus a price for the work it makes,
wins. A prediction has these parts, all learned online per worker:

    first token = intercept + pace * (work ahead + own work) + interference
    end         = first token + expected output tokens * time per output token

Work is uncached tokens with prefill's quadratic term (`queue.prefill_work`); the work ahead is what the
router has sent and not yet heard of (`queue.PrefillQueue`); interference comes from sequences decoding. How
it is learned: `worker`; the price: `price`.

What the published rule has and this has not: an exponentially decaying load. With the events of first tokens
the work ahead is known, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, isfinite
from random import Random

from kvist.model import Query, WorkerState
from kvist.routing.base import Candidate, Decision, Outcome, RoutingPolicy, Status, Ticket
from kvist.routing.lbgr.output import OutputLengths
from kvist.routing.lbgr.price import delayed
from kvist.routing.lbgr.queue import CONTEXT
from kvist.routing.lbgr.worker import Fleet, Worker, fresh_model
from kvist.routing.rls import checked

OBJECTIVES = {"ttft": "time to first token", "latency": "latency", "slo": "work within the target"}
DECODERS = 0.5  # of a prefill's time is lost to each sequence that decodes beside it, for `latency`
CROWD = 1.0  # a sequence will delay others by what those decoding delay it (Little's law)
CLOSE, CLOSE_SECONDS = 0.05, 0.0025  # predictions that differ by less say nothing
VERSION = 3


class LBGR(RoutingPolicy):
    name = "lbgr"
    description = "Learns each worker's latency online; the smallest, plus a price for delaying others, wins."
    source = "after paper section 3 (arXiv 2601.18999)"
    params = {
        "objective": "what is minimised: `ttft`, `latency` (end to end) or `slo` (requests beyond slo_ttft)",
        "forgetting": "weight of the past per observation (0.98)",
        "congestion": "weight of the price for delaying others (1.0); 0: selfish",
        "slo_ttft": "seconds to first token that objective `slo` must meet (2.0)",
        "shortlist": "of more workers, so many are scored: longest prefixes, random others (64); 0: all",
    }

    def __init__(
        self,
        *,
        objective: str = "ttft",
        forgetting: float = 0.98,
        congestion: float = 1.0,
        slo_ttft: float = 2.0,
        shortlist: int = 64,
        rng: Random | None = None,
    ) -> None:
        super().__init__(rng=rng)
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
        if not 0 <= congestion < inf:
            raise ValueError(f"congestion must be at least 0, not {congestion}")
        if not 0 < slo_ttft < inf:
            raise ValueError(f"slo_ttft must be above 0 seconds, not {slo_ttft}")
        if shortlist < 0:
            raise ValueError(f"shortlist must not be negative, not {shortlist}")
        self.shortlist = shortlist
        self.objective = objective
        self.congestion = congestion
        self.forgetting = forgetting
        self.slo_ttft = slo_ttft
        self._plain = f"smallest predicted {OBJECTIVES[objective]}"
        self._priced = f"{self._plain} + price for delaying others"
        fresh_model(forgetting)  # a wrong `forgetting` shows now
        self._fleet = Fleet()
        self._workers = self._fleet.workers
        self._outputs = OutputLengths()
        self._restored: dict[str, dict[str, object]] = {}

    def worker_added(self, worker: WorkerState, now: float) -> None:
        own = self._workers.get(worker.id)
        if own is None or own.state is not worker:
            model = fresh_model(self.forgetting)
            model.theta = self._fleet.typical()
            own = Worker(worker, model, now)
            self._fleet.add(own)
        if worker.id in self._restored:
            own.model = fresh_model(self.forgetting)
            own.model.load(self._restored.pop(worker.id))
            self._fleet.heard(own)

    def worker_removed(self, worker: WorkerState, now: float) -> None:
        self._fleet.remove(worker.id)

    def choose(self, query: Query, candidates: Sequence[Candidate], now: float) -> Decision:
        fleet, workers, length = self._fleet, self._workers, query.length
        usual, answers = fleet.mean_work, fleet.answers
        output = self._outputs.expect(query)
        usual_tpot = fleet.tpot
        stalls = DECODERS if self.objective == "latency" else 0.0
        firsts, ends, works, features, tolls, waits = [], [], [], [], [], []
        ideal, rate = inf, 0.0
        for candidate in candidates:
            state, cached = candidate.worker, candidate.cached
            own = workers[state.id]
            in_flight, waiting = state.in_flight, state.waiting
            miss = length - cached if length > cached else 1  # an engine computes at least the last token
            work = miss + CONTEXT * miss * (cached + 0.5 * miss)  # prefill_work, inlined: it is in every loop
            used, drift = own.used, own.drift
            if not in_flight and answers - own.learned >= own.patience:
                small = work <= 4 * usual
                if small or not own.model.observations:  # not heard of for long: with something small
                    used, drift = fleet.fastest(own)
            base, per_work, per_decode = used
            factor = exp(drift) if drift else 1.0
            pace = per_work * factor / 1000
            queue, late = own.queue.look(now, pace, factor * base) if waiting else (0.0, 0.0)
            if state.load_elsewhere:
                elsewhere = 1000 * state.load_elsewhere
                queue += elsewhere
                late = max(late - pace * elsewhere, 0.0)  # what is overdue here waits for those
            decoding = in_flight - waiting
            ahead, crowd = (queue + work) / 1000, (decoding + state.others) / 10
            first = late + factor * (base + per_work * ahead + per_decode * crowd)
            firsts.append(first)
            ends.append(first + (output - 1) * (own.tpot if own.tpots else usual_tpot))
            works.append(work)
            features.append((1.0, ahead, crowd))
            tolls.append(CROWD * factor * per_decode * crowd + stalls * pace * decoding * work)
            waits.append(pace * (queue + usual) + late)
            rate += 1 / pace
            if pace < ideal:
                ideal = pace
        price = 0.0
        if self.congestion:
            least = ideal * usual
            many = delayed([c.worker.waiting for c in candidates], [wait - least for wait in waits])
            price = self.congestion * many * len(candidates) / rate
        told = ends if self.objective == "latency" else firsts
        scores = [t + toll + price * work for t, toll, work in zip(told, tolls, works, strict=True)]
        if self.objective == "slo":
            self._prefer_good(scores, firsts, works)
        chosen = self._smallest(scores, works, candidates)
        candidate = candidates[chosen]
        return Decision(
            candidate.worker.id,
            candidate.cached,
            ends[chosen],
            scores,
            self._reason(scores, chosen, price),
            predicted_ttft=firsts[chosen],
            memo=(*features[chosen], works[chosen]),
        )

    def _reason(self, scores: Sequence[float], chosen: int, price: float) -> str:
        words = self._priced if price else self._plain
        if scores[chosen] > min(scores):
            words += "; near equals: what saves work, then the emptiest cache"
        return words

    def _prefer_good(self, scores: list[float], firsts: Sequence[float], works: Sequence[float]) -> None:
        """Among workers that should meet the target, least work; it leaves the most room for the others."""
        limit = 0.7 * self.slo_ttft
        if min(firsts) > limit:
            return
        pace = max(firsts) / max(max(works), 1.0)
        for i, first in enumerate(firsts):
            scores[i] = pace * works[i] + 0.1 * first if first <= limit else first + 1000 * self.slo_ttft

    def _smallest(
        self, scores: Sequence[float], works: Sequence[float], candidates: Sequence[Candidate]
    ) -> int:
        """The smallest score; of those that cannot be told apart from it, one that saves work.

        Where none saves much, the one with the emptiest cache: a new prefix pushes out least there, and the
        requests that follow it are spread.
        """
        limit = min(scores) * (1.0 + CLOSE) + CLOSE_SECONDS
        close = [i for i, score in enumerate(scores) if score <= limit]
        if len(close) == 1:
            return close[0]
        limit = min([works[i] for i in close]) + 0.1 * max(works)
        close = [i for i in close if works[i] <= limit]
        held = [candidates[i].worker.cached_tokens for i in close]
        least = min(held)
        ties = [i for i, tokens in zip(close, held, strict=True) if tokens == least]
        return ties[0] if len(ties) == 1 else ties[int(self.rng.random() * len(ties))]

    def dispatched(self, ticket: Ticket, now: float) -> None:
        own = self._workers[ticket.worker.id]
        ticket.memo = ticket.decision.memo
        work = ticket.memo[-1]
        own.queue.add(ticket, work, now)
        own.state.load = own.queue.total / 1000
        self._fleet.mean_work += 0.02 * (work - self._fleet.mean_work)

    def first_token(self, ticket: Ticket, now: float) -> None:
        own = self._known(ticket)
        if own is None:
            return
        own.queue.streams += 0.1 * (1.0 - own.queue.streams)
        own.queue.remove(ticket, now, own.pace, computed=True)
        own.state.load = own.queue.total / 1000
        if not own.worth(now):
            self._fleet.passed(own)
            return
        self._learn(own, ticket, now - ticket.routed_at, now)

    def completed(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        own = self._known(ticket)
        if own is None:
            return
        good = outcome.status is Status.OK
        own.queue.remove(ticket, now, own.pace, computed=good)
        own.state.load = own.queue.total / 1000
        if outcome.status is Status.FAILED:
            self._fleet.failed(own)
        latency, ttft, tokens = outcome.latency, outcome.ttft, outcome.output_tokens
        if not good or latency is None or not isfinite(latency) or latency < 0:
            return
        if ticket.first_token_at is None:
            own.queue.streams -= 0.1 * own.queue.streams
        if not own.worth(now):
            self._fleet.passed(own)
            return
        self._outputs.learn(ticket.query, tokens)
        if ttft is not None and isfinite(ttft) and tokens > 1:
            self._fleet.decoded(own, (latency - ttft) / (tokens - 1))
        if ticket.first_token_at is not None:
            return
        if ttft is None:
            ttft = max(latency - max(tokens - 1, 0) * own.tpot, 0.0)
        self._learn(own, ticket, ttft, now)

    def _known(self, ticket: Ticket) -> Worker | None:
        own = self._workers.get(ticket.worker.id)
        return own if own is not None and own.state is ticket.worker and ticket.memo else None

    def _learn(self, own: Worker, ticket: Ticket, seen: float, now: float) -> None:
        ratio = own.learn(ticket.memo[:-1], seen, now)
        self._fleet.answered(own, ratio)
        self._fleet.heard(own)

    def health(self) -> dict[str, dict[str, float]]:
        return {
            worker_id: {
                "error": own.model.error,
                "drift": exp(own.drift),
                "pace": own.pace,
                "tpot": own.tpot,
                "answers": float(own.model.observations),
            }
            for worker_id, own in self._workers.items()
        }

    def snapshot(self) -> dict[str, object]:
        workers = {worker_id: own.model.dump() for worker_id, own in self._workers.items()}
        return {"version": VERSION, "workers": workers}

    def restore(self, state: dict[str, object]) -> None:
        """Applies to workers that are there and to those that join later."""
        if state.get("version") != VERSION:
            raise ValueError(f"version: {VERSION} expected, not {state.get('version')!r}")
        workers = state.get("workers")
        if not isinstance(workers, dict):
            raise ValueError("workers: an object of workers by id expected")
        for worker_id, dump in checked(workers, lambda: fresh_model(self.forgetting)).items():
            self._restored[worker_id] = dump
            own = self._workers.get(worker_id)
            if own is not None:
                self.worker_added(own.state, own.at)
