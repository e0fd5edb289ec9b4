"""The last minutes, for the dashboard: one sample a second, of constant size.

`data()` is what GET /dashboard/data answers:
    {"policy": str, "active": int, "queued": int, "refused": {status: n}, "now": seconds, "uptime": seconds,
     "workers": [row of Fleet.rows() + {"requests", "hit_rate", "p50", "p95", "p99", "error"}],
     "series": {"time": [...], "in_flight": {worker: [...]}, "hit_rate": [...], "p50": [...], "p95": [...],
                "p99": [...], "ttft": [...], "error": [...], "rate": [...]},
     "recent": [a decision and its outcome, newest last; see `described`]}
Times in seconds; hit_rate is true cached / prompt tokens where engines tell, else the index's estimate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from kvist.routing import Outcome, Status, Ticket

if TYPE_CHECKING:
    from kvist.gateway.app import Gateway

SAMPLES = 300  # seconds that are kept
RECENT = 50  # ended requests
COMPARED = 256  # workers up to which a decision's scores are shown
LATENCIES = 512  # of each worker, for its percentiles
WINDOW = 1024  # so that closing a second's window stays well under a millisecond


class _Window:
    """Requests that ended since the last sample; the latest WINDOW of them for the percentiles."""

    def __init__(self) -> None:
        self.ended = 0
        self.latencies: deque[float] = deque(maxlen=WINDOW)
        self.errors: deque[float] = deque(maxlen=WINDOW)
        self.first: deque[float] = deque(maxlen=WINDOW)
        self.cached = 0
        self.prompt = 0


class History:
    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.samples: deque[dict[str, Any]] = deque(maxlen=SAMPLES)
        self._window = _Window()
        self._latest: dict[str, deque[float]] = {}
        self._sampled_at = -1.0
        self._started = gateway.now()
        self._recent: deque[tuple[str, Ticket, Outcome, float]] = deque(maxlen=RECENT)

    def ended(self, ticket: Ticket, outcome: Outcome, path: str, now: float) -> None:
        self._recent.append((path, ticket, outcome, now))
        if outcome.status is not Status.OK or outcome.latency is None:
            return
        window = self._window
        window.ended += 1
        window.latencies.append(outcome.latency)
        if ticket.decision.predicted is not None:
            window.errors.append(abs(outcome.latency - ticket.decision.predicted))
        if outcome.ttft is not None:
            window.first.append(outcome.ttft)
        cached = ticket.decision.cached if outcome.cached_tokens is None else outcome.cached_tokens
        window.cached += cached
        window.prompt += ticket.query.length
        latest = self._latest.get(ticket.worker.id)
        if latest is None:
            latest = self._latest[ticket.worker.id] = deque(maxlen=LATENCIES)
        latest.append(outcome.latency)

    def sample(self, now: float) -> None:
        """Close the window once a second."""
        if now - self._sampled_at < 1.0:
            return
        window, self._window = self._window, _Window()
        states = {w.id: w.in_flight for w in self.gateway.fleet.router.workers}
        self._latest = {worker: own for worker, own in self._latest.items() if worker in states}
        self.samples.append(
            {
                "time": now,
                "in_flight": states,
                "hit_rate": window.cached / window.prompt if window.prompt else None,
                "p50": quantile(window.latencies, 0.5),
                "p95": quantile(window.latencies, 0.95),
                "p99": quantile(window.latencies, 0.99),
                "ttft": quantile(window.first, 0.5),
                "error": quantile(window.errors, 0.5),
                "rate": window.ended / max(now - self._sampled_at, 1.0),
            }
        )
        self._sampled_at = now

    def data(self) -> dict[str, Any]:
        gateway = self.gateway
        workers = []
        for row in gateway.fleet.rows():
            metrics = gateway.metrics.worker(row["id"])
            latest = list(self._latest.get(row["id"], ()))
            ended = sum(metrics.error.counts)
            workers.append(
                {
                    **row,
                    "requests": sum(metrics.outcomes.values()),
                    "hit_rate": metrics.cached_true / metrics.prompt_true if metrics.prompt_true else None,
                    "p50": quantile(latest, 0.5),
                    "p95": quantile(latest, 0.95),
                    "p99": quantile(latest, 0.99),
                    "error": metrics.error.total / ended if ended else None,
                }
            )
        names = [row["id"] for row in workers]
        series: dict[str, Any] = {
            name: [sample[name] for sample in self.samples]
            for name in ("time", "hit_rate", "p50", "p95", "p99", "ttft", "error", "rate")
        }
        series["in_flight"] = {
            name: [sample["in_flight"].get(name, 0) for sample in self.samples] for name in names
        }
        return {
            "policy": gateway.fleet.router.policy.name,
            "active": gateway.admission.active,
            "queued": gateway.admission.waiting,
            "refused": dict(gateway.metrics.refused),
            "now": gateway.now(),
            "uptime": gateway.now() - self._started,
            "workers": workers,
            "series": series,
            "recent": [described(*ended) for ended in self._recent],
        }


def described(path: str, ticket: Ticket, outcome: Outcome, at: float) -> dict[str, Any]:
    """A decision and its outcome as plain data.

    `scores` are what the policy compared for each of `candidates`, smaller is better: predicted seconds where
    `predicted` is a number. Both are empty where a policy does not compare all of them.
    """
    decision, query = ticket.decision, ticket.query
    compared = len(decision.scores) == len(ticket.candidates) <= COMPARED
    return {
        "id": query.id,
        "at": at,
        "path": path,
        "worker": decision.worker,
        "status": str(outcome.status),
        "prompt": query.length,
        "prompt_unit": "bytes" if query.unit == 1 else "tokens",
        "cached": decision.cached,
        "cached_true": outcome.cached_tokens,
        "predicted": decision.predicted,
        "latency": outcome.latency,
        "ttft": outcome.ttft,
        "reason": decision.reason,
        "candidates": [c.worker.id for c in ticket.candidates] if compared else [],
        "scores": list(decision.scores) if compared else [],
    }


def quantile(values: Collection[float], share: float) -> float | None:
    """The value below which `share` of the values lie; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
