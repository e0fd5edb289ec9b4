"""What LBGR knows of one worker, and what the fleet knows together.

The time to first token is linear in features that the router knows exactly; coefficients are learned by
recursive least squares on relative errors (a tenth off is as bad at 0.1 s as at 10 s). On top, a fast factor
follows actual over predicted, for a worker that is throttled or recovers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, isfinite, log

from kvist.model import WorkerState
from kvist.routing.lbgr.queue import PrefillQueue
from kvist.routing.rls import RecursiveLeastSquares

# Features: 1; work ahead and own, in 1000 tokens; sequences decoding, in 10. An 8B model needs about 0.02 s
# per 1000 tokens of work on an H100 and 0.14 s on an L40; the first answers settle which it is. TOGETHER and
# SPREAD are in units of the relative error: workers differ by a common factor above all, and each coefficient
# by some more.
PRIOR = (0.02, 0.08, 0.002)
TOGETHER = 4.0
SPREAD = (0.04, 0.16, 0.01)
BOUNDS = ((0.0, inf), (1e-5, inf), (0.0, inf))
PACE = 1  # coefficient: seconds of 1000 tokens of work
FLOOR = 0.02  # seconds that are added to both before predicted and actual are compared
FAST = 0.05  # gain of the drift factor
CHANGED = log(1.5)  # drift from which the worker is learned anew
MOST_DRIFT = log(16.0)
RECOVERED = 0.7  # actual over predicted, below which a worker that was tried again has changed
STALE = 50  # answers of a mean worker, after which one that got nothing is tried again
MOST_PATIENCE = 100 * STALE
DECODE_GAIN = 0.02
RATE, BURST = 50.0, 100.0  # answers of a worker learned from, a second and at once; more tell no more

Coefficients = tuple[float, ...]


def fresh_model(forgetting: float) -> RecursiveLeastSquares:
    """Of a worker that was not heard of yet. Raises ValueError for a wrong `forgetting`."""
    return RecursiveLeastSquares(PRIOR, SPREAD, BOUNDS, forgetting, TOGETHER)


class Worker:
    __slots__ = (
        "at",
        "drift",
        "learned",
        "model",
        "patience",
        "queue",
        "room",
        "room_at",
        "state",
        "tpot",
        "tpots",
        "used",
    )

    def __init__(self, state: WorkerState, model: RecursiveLeastSquares, now: float) -> None:
        self.state = state
        self.model = model
        self.used: Coefficients = tuple(model.theta)  # what it predicts with
        self.queue = PrefillQueue(now)
        self.drift = 0.0  # log of actual over predicted, of late
        self.at = now  # of the last observation
        self.tpot = 0.0  # seconds a further output token
        self.tpots = 0
        self.learned = 0  # the fleet's answers when this worker last gave one
        self.patience = 0  # answers of the fleet after which it is tried again, if idle
        self.room = BURST  # answers that it may be learned from at once, as of `room_at`
        self.room_at = now

    @property
    def pace(self) -> float:
        """Seconds a token of work."""
        return self.used[PACE] * exp(self.drift) / 1000

    def worth(self, now: float) -> bool:
        """Whether one more answer is learned from: a bucket of BURST that RATE a second fills."""
        self.room = min(BURST, self.room + (now - self.room_at) * RATE)
        self.room_at = now
        if self.room < 1.0:
            return False
        self.room -= 1.0
        return True

    def learn(self, x: Sequence[float], seen: float, now: float) -> float:
        """One time to first token in seconds; returns it over what the model said. Nonsense is ignored."""
        if not isfinite(seen) or seen < 0:
            return 1.0
        told = sum(t * v for t, v in zip(self.model.theta, x, strict=True)) + FLOOR
        ratio = min(max(log((seen + FLOOR) / told), -MOST_DRIFT), MOST_DRIFT)
        if self.model.observations:
            self.drift += FAST * (ratio - self.drift)
        self.model.update([v / told for v in x], seen / told)
        if abs(self.drift) > CHANGED:
            self.start_over(exp(self.drift))
        self.at = now
        return exp(ratio)

    def start_over(self, factor: float) -> None:
        """The worker is not what it was: scale the model and be as unsure as at the start."""
        fresh = fresh_model(self.model.forgetting)
        fresh.theta = [max(t * factor, low) for t, (low, _) in zip(self.model.theta, BOUNDS, strict=True)]
        fresh.observations, fresh.error = self.model.observations, self.model.error
        self.model, self.drift = fresh, 0.0

    def decoded(self, seconds: float) -> None:
        """The time of one further output token; an outlier counts as ten times the usual."""
        if not isfinite(seconds) or seconds < 0:
            return
        self.tpots += 1
        gain = max(DECODE_GAIN, 1 / self.tpots)
        off = (min(seconds, 10 * self.tpot) if self.tpots > 1 else seconds) - self.tpot
        self.tpot += gain * off


class Fleet:
    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.answers = 0
        self.mean_work = 1000.0  # of a request, in tokens
        self.tpot = 0.0  # seconds a further output token, of a worker that has not decoded yet
        self._fastest: Worker | None = None

    def add(self, own: Worker) -> None:
        self.remove(own.state.id)
        self.workers[own.state.id] = own
        own.learned = self.answers
        self.heard(own)

    def remove(self, worker_id: str) -> None:
        gone = self.workers.pop(worker_id, None)
        if gone is self._fastest:
            self._fastest = None

    def typical(self) -> list[float]:
        """Coefficients for a worker that joins: the mean of those known."""
        known = [own.model.theta for own in self.workers.values() if own.model.observations]
        return [sum(each) / len(known) for each in zip(*known, strict=True)] if known else list(PRIOR)

    def heard(self, own: Worker) -> None:
        """The worker's model has changed: set what it predicts with."""
        own.used = tuple(own.model.theta)
        if self._fastest is own:
            self._fastest = None
        elif self._fastest is not None and own.used[PACE] < self._fastest.used[PACE]:
            self._fastest = own

    def fastest(self, own: Worker) -> tuple[Coefficients, float]:
        """(coefficients, drift) of the fastest worker known, or its own, for one that must be tried."""
        if self._fastest is None:
            known = [worker for worker in self.workers.values() if worker.model.observations]
            self._fastest = min(known, key=lambda worker: worker.used[PACE], default=None)
        best = self._fastest
        if best is None or own.used[PACE] < best.used[PACE]:
            best = own
        return best.used, best.drift

    def decoded(self, own: Worker, seconds: float) -> None:
        """The time of one further output token on this worker."""
        own.decoded(seconds)
        self.tpot += max(DECODE_GAIN, 1 / (self.answers + 1)) * (own.tpot - self.tpot)

    def passed(self, own: Worker) -> None:
        """An answer came that is not learned from."""
        self.answers += 1
        own.learned = self.answers

    def answered(self, own: Worker, ratio: float) -> None:
        """An answer came, `ratio` times what the worker's own model had told.

        A worker that was tried again and is as slow as it was is left alone for longer.
        """
        self.answers += 1
        least = STALE * len(self.workers)
        tried = self.answers - own.learned > own.patience > 0
        if tried and ratio < RECOVERED:
            own.start_over(ratio)
        if tried and ratio >= RECOVERED:
            own.patience = min(2 * own.patience, MOST_PATIENCE * len(self.workers))
        elif tried or not own.patience:
            own.patience = least
        own.learned = self.answers

    def failed(self, own: Worker) -> None:
        """No answer came. A worker that fails is not worth a try for a while."""
        own.patience = min(max(2 * own.patience, STALE), MOST_PATIENCE * len(self.workers))
        own.learned = self.answers
