"""The embedded engine's /metrics, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvist.engine.driver import Driver
from kvist.engine.kv_events import Publisher
from kvist.http.histogram import SECONDS, SHORT, Histogram


class EngineMetrics:
    """Times are modelled seconds."""

    def __init__(self, driver: Driver, model: str, publisher: Publisher | None = None) -> None:
        self.driver = driver
        self.model = model
        self.publisher = publisher
        self.ttft = Histogram(SECONDS)
        self.itl = Histogram(SHORT)
        self.latency = Histogram(SECONDS)
        self.disconnects = 0

    def collect(self) -> Iterator[Any]:
        """For prometheus-client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        engine = self.driver.engine
        stats, cache = engine.stats, engine.cache
        label, value = ["model_name"], [self.model]
        for name, number in (
            ("num_requests_running", len(engine.running)),
            ("num_requests_waiting", len(engine.waiting)),
            ("kv_cache_usage_perc", engine.kv_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=label)
            gauge.add_metric(value, number)
            yield gauge
        for name, number in (
            ("prefix_cache_queries", stats.prompt_tokens),
            ("prefix_cache_hits", stats.hit_tokens),
            ("prompt_tokens", stats.prompt_tokens),
            ("generation_tokens", stats.output_tokens),
            ("num_preemptions", stats.preemptions),
            ("request_success", stats.finished),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=label)
            counter.add_metric(value, number)
            yield counter
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "cache configuration", labels=["block_size", "num_gpu_blocks"]
        )
        info.add_metric([str(cache.block_size), str(cache.capacity_blocks)], 1)
        yield info
        for name, histogram in (
            ("time_to_first_token_seconds", self.ttft),
            ("inter_token_latency_seconds", self.itl),
            ("e2e_request_latency_seconds", self.latency),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=label)
            family.add_metric(value, histogram.buckets(), histogram.total)
            yield family
        for name, number in (("evicted_blocks", cache.evicted_blocks), ("disconnects", self.disconnects)):
            own = CounterMetricFamily(f"kvist:{name}", name.replace("_", " "), labels=["eviction"])
            own.add_metric([cache.eviction.name], number)
            yield own
        if self.publisher is not None:
            said = CounterMetricFamily("kvist:kv_events", "KV events, published or about to be", labels=label)
            said.add_metric(value, self.publisher.events)
            yield said
            heard = GaugeMetricFamily("kvist:kv_event_subscriptions", "who hears of them", labels=label)
            heard.add_metric(value, self.publisher.subscriptions)
            yield heard

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)
