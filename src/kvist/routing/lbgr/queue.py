"""The prefill work ahead of a new request at one worker, as a virtual queue.

Work is added when a request is routed and taken off, exactly, when its first token arrives; in between it
drains at the worker's learned pace. An engine that streams would have sent the first token of the request in
front if it were done, so no more can have drained than that request's work or one step's tokens: a worker
that stalls keeps its queue. An engine that does not stream says nothing before the end; its queue drains on
the pace alone.
"""

from __future__ import annotations

# Attention to one token of context, in units of computing one token. The shipped latency profiles (fitted to
# measured kernels, 8B to 70B, RTX 4090 to H200) lie between 1.9e-5 and 5.4e-5.
CONTEXT = 4e-5
STEP = 2048.0  # tokens of an engine's step (vLLM's max_num_batched_tokens), which may hold several prompts


def prefill_work(cached: int, miss: int) -> float:
    """Work of computing `miss` tokens behind `cached` ones, in tokens; prefill's quadratic term included."""
    return miss + CONTEXT * miss * (cached + 0.5 * miss)


class PrefillQueue:
    """First come, first served. Keys are tickets, work is in tokens, time and pace in seconds (a token)."""

    __slots__ = ("_credit", "_since", "_work", "streams", "total")

    def __init__(self, now: float) -> None:
        self._work: dict[object, float] = {}  # in order of arrival
        self.total = 0.0
        self._credit = 0.0  # work done on the front as of `_since`
        self._since = now
        self.streams = 1.0  # share of answers whose first token was seen

    def __len__(self) -> int:
        return len(self._work)

    def add(self, key: object, work: float, now: float) -> None:
        if not self._work:
            self._since, self._credit, self.total = now, 0.0, 0.0
        self._work[key] = work
        self.total += work

    def look(self, now: float, pace: float, base: float = 0.0) -> tuple[float, float]:
        """(work that is left, seconds by which the first token in front is overdue).

        base: seconds that a first token takes whatever the work.
        """
        if not self._work:
            return 0.0, 0.0
        waited = max(now - self._since, 0.0)
        done = self._credit + waited / pace
        late = 0.0
        if self.streams >= 0.5:
            most = min(self._most(), self.total)
            if done > most:
                late = max(waited - base - (most - self._credit) * pace, 0.0)
                done = most
        return max(self.total - done, 0.0), late

    def remove(self, key: object, now: float, pace: float, *, computed: bool) -> None:
        """The request's first token came (computed), or it ended before that. Unknown keys do nothing."""
        if key not in self._work:
            return
        done = self.total - self.look(now, pace)[0]
        front = next(iter(self._work)) is key
        work = self._work.pop(key)
        self.total = max(self.total - work, 0.0) if self._work else 0.0
        if computed:
            done = max(done - work, 0.0)
        elif front:
            done = 0.0  # what was done for it helps nobody
        self._credit = min(done, self.total)
        self._since = max(now, self._since)

    def _most(self) -> float:
        """The most that can be done without a first token."""
        return max(next(iter(self._work.values())), STEP)
