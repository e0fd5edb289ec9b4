"""What the gateway counts, as plain numbers; turned into Prometheus families only when scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from kvist.http.histogram import SECONDS, SHORT, Histogram


class WorkerMetrics:
    """Figures of one worker."""

    __slots__ = (
        "cached_estimated",
        "cached_true",
        "cut",
        "error",
        "itl",
        "latency",
        "outcomes",
        "prompt_true",
        "retries",
        "ttft",
    )

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()  # ok, failed, cancelled
        self.retries = 0  # requests that went elsewhere after failing here
        self.cut = 0  # answers broken off after the client had seen part of them
        self.ttft = Histogram(SECONDS)
        self.itl = Histogram(SHORT)
        self.latency = Histogram(SECONDS)
        self.error = Histogram(SECONDS)  # |predicted - observed|
        self.cached_estimated = 0.0  # tokens, over requests whose truth is known
        self.cached_true = 0
        self.prompt_true = 0


class Metrics:
    """Figures of the gateway."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerMetrics] = {}
        self.decisions: Counter[tuple[str, str]] = Counter()  # (policy, worker)
        self.refused: Counter[str] = Counter()  # by HTTP status
        self.disconnects = 0
        self.token_counts = {
            True: 0,
            False: 0,
        }  # prompts, by whether the engine counts as many
        self.decision_seconds = 0.0

    def worker(self, worker_id: str) -> WorkerMetrics:
        if worker_id not in self.workers:
            self.workers[worker_id] = WorkerMetrics()
        return self.workers[worker_id]


class Collector:
    """For prometheus-client: reads the numbers, and the fleet's state, at each scrape."""

    def __init__(self, metrics: Metrics, state: Any) -> None:
        self.metrics = metrics
        self.state = state  # kvist.gateway.app.Gateway

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Count
        from prometheus_client.core import GaugeMetricFamily as Gauge
        from prometheus_client.core import HistogramMetricFamily as Hist

        m, gateway = self.metrics, self.state

        def family(kind: Any, name: str, text: str, labels: list[str], rows: Iterable[Any]) -> Any:
            made = kind(f"kvist_{name}", text, labels=labels)
            for values, value in rows:
                made.add_metric(list(values), value)
            return made

        yield family(
            Count, "decisions", "Routing decisions.", ["policy", "worker"], list(m.decisions.items())
        )
        yield family(
            Count,
            "refused_requests",
            "Requests refused, by HTTP status.",
            ["status"],
            [((status,), n) for status, n in m.refused.items()],
        )
        yield family(Count, "client_disconnects", "Clients that left early.", [], [((), m.disconnects)])
        yield family(
            Count, "decision_seconds", "Time spent in routing decisions.", [], [((), m.decision_seconds)]
        )
        yield family(Gauge, "active_requests", "Requests under way.", [], [((), gateway.admission.active)])
        yield family(Gauge, "queued_requests", "Requests waiting.", [], [((), gateway.admission.waiting)])
        yield family(Gauge, "client_connections", "Open connections.", [], [((), gateway.open_clients)])
        if (sharing := gateway.sharing) is not None:
            yield family(Gauge, "sharing_peers", "Gateways heard of lately.", [], [((), sharing.peers)])
            connected = [((), float(sharing.connected))]
            yield family(Gauge, "sharing_connected", "1 if the last exchange went well.", [], connected)
        yield from self._knowledge(family, Count, Gauge)
        rows = gateway.fleet.rows()
        for name, text in (
            ("in_flight", "Requests in flight on the worker."),
            ("load", "Load reserved on the worker, in the policy's units."),
            ("index_tokens", "Tokens the index believes the worker holds."),
            ("healthy", "1 if the worker takes requests."),
            ("upstream_connections", "Connections to the worker."),
            ("others", "Requests on the worker that were not routed here, by its own metrics."),
            ("running", "Requests running, by the worker's own metrics."),
            ("waiting", "Requests waiting, by the worker's own metrics."),
            ("kv_usage", "Share of the KV cache in use, by the worker's own metrics."),
            ("capacity", "Tokens of KV cache, by the worker's own metrics."),
        ):
            told = [((row["id"],), row[name]) for row in rows if row[name] is not None]
            yield family(Gauge, f"worker_{name}", text, ["worker"], told)
        for name, text in (
            ("error", "Usual relative error of the policy's predictions."),
            ("drift", "Actual over predicted of late, 1: none."),
        ):
            told = [((row["id"],), row["predictions"][name]) for row in rows if row["predictions"]]
            yield family(Gauge, f"worker_prediction_{name}", text, ["worker"], told)
        yield family(
            Gauge,
            "worker_breaker",
            "Circuit breaker, 1 for the state it is in.",
            ["worker", "state"],
            [
                ((row["id"], state), float(row["breaker"] == state))
                for row in rows
                for state in ("closed", "half_open", "open")
            ],
        )
        workers = m.workers.items()
        yield family(
            Count,
            "requests",
            "Ended requests by outcome.",
            ["worker", "outcome"],
            [((w, outcome), n) for w, own in workers for outcome, n in own.outcomes.items()],
        )
        for name, text in (
            ("retries", "Requests sent elsewhere after failing here."),
            ("cut", "Answers broken off midway."),
            ("cached_estimated", "Cached prompt tokens as estimated, where the truth is known."),
            ("cached_true", "Cached prompt tokens as the engine counted."),
            ("prompt_true", "Prompt tokens as the engine counted."),
        ):
            yield family(Count, name, text, ["worker"], [((w,), getattr(own, name)) for w, own in workers])
        for name, field, text in (
            ("ttft_seconds", "ttft", "Time to first token of streams."),
            ("itl_seconds", "itl", "Time between pieces of a stream."),
            ("latency_seconds", "latency", "End-to-end latency."),
            ("prediction_error_seconds", "error", "Difference of predicted and observed latency."),
        ):
            made = Hist(f"kvist_{name}", text, labels=["worker"])
            for worker_id, own in workers:
                histogram = getattr(own, field)
                made.add_metric([worker_id], histogram.buckets(), histogram.total)
            yield made

    def _knowledge(self, family: Any, Count: Any, Gauge: Any) -> Iterator[Any]:
        """Of the tokenizer and the KV events, where there are any."""
        knowledge, fleet = self.state.knowledge, self.state.fleet
        if (tokens := knowledge.tokens) is not None:
            yield family(
                Count,
                "tokenized_prompts",
                "Prompts made into token ids whose number the engine told, by whether it counts the same.",
                ["agrees"],
                [((str(agrees).lower(),), n) for agrees, n in self.metrics.token_counts.items()],
            )
            for name, text in (
                ("as_text", "Prompts that the tokenizer could not make token ids of."),
                ("in_threads", "Prompts that were tokenised in a thread."),
            ):
                yield family(Count, f"tokenizer_{name}", text, [], [((), getattr(tokens, name))])
        if knowledge.subscriptions is None:
            return
        feeds = [
            ((worker.id, str(feed.rank)), feed)
            for worker in fleet.router.workers
            for feed in knowledge.subscriptions.feeds.get(worker.slot, ())
        ]
        labels = ["worker", "rank"]
        for name, text in (
            ("batches", "Batches of KV events."),
            ("events", "KV events that concern GPU memory."),
            ("gaps", "Batches missing in the sequence."),
            ("replays", "Gaps that a replay answered."),
            ("resets", "Times that what a publisher had said was forgotten for lack of a part of it."),
            ("restarts", "Engines that started afresh."),
            ("invalid", "Messages that could not be read."),
            ("unknown_parents", "Stored blocks whose parent was never announced."),
        ):
            rows = [(label, getattr(feed.counts, name)) for label, feed in feeds]
            yield family(Count, f"kv_events_{name}", text, labels, rows)
        expected = knowledge.subscriptions.index.expected
        yield family(
            Count,
            "kv_events_expected_blocks",
            "Blocks that counted before the engine's word for them, by whether it came.",
            ["came"],
            [(("true",), expected.confirmed), (("false",), expected.expired)],
        )
        yield family(
            Gauge,
            "kv_events_lag_seconds",
            "From the latest batch's timestamp to its arrival, by the two hosts' clocks.",
            labels,
            [(label, feed.counts.lag) for label, feed in feeds],
        )
        yield family(
            Gauge,
            "kv_events_state",
            "How far the events reach, 1 for the state they are in.",
            [*labels, "state"],
            [
                ((*label, state), float(feed.state == state))
                for label, feed in feeds
                for state in ("silent", "partial", "exact")
            ],
        )


def exposition(collector: Collector) -> bytes:
    """The text that Prometheus scrapes."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
