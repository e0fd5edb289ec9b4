"""The endpoints of a pool: the gateway's fleet (health checks, models, circuit breakers), kept in step with
whoever discovers them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from kvist.gateway.fleet import Fleet
from kvist.gateway.knowledge.knowledge import Knowledge
from kvist.picker.protocol import url_of
from kvist.picker.settings import PickerSettings
from kvist.routing import make_policy


class EndpointFleet(Fleet):
    """See `kvist.picker.flight.Endpoints`; workers go by `http://ip:port`. Needs a running event loop."""

    settings: PickerSettings

    def __init__(self, settings: PickerSettings, log: Callable[..., None]) -> None:
        policy = make_policy(settings.policy, rng=Random(settings.seed), **settings.policy_arguments())
        self.knowledge = Knowledge(settings, lambda: self.adapters(), log)
        super().__init__(settings, policy, self.knowledge.index, self.knowledge.subscriptions)
        self.log = log

    def replace(self, found: Mapping[str, bool], now: float) -> None:
        """Take over what discovery found: endpoints, and whether each is ready. What is gone is forgotten;
        what is there but not ready gets nothing new and keeps what was learned of it."""
        wanted = {url_of(place): ready for place, ready in found.items()}
        for url in [url for url in self.workers if url not in wanted]:
            self.remove(url, now)
            self.log("endpoint gone", endpoint=url)
        for url, ready in wanted.items():
            if url not in self.workers:
                if not ready:
                    continue
                self.add(url, now)
                self.log("endpoint", endpoint=url)
            elif self.workers[url].draining is ready:
                self.drain(url, not ready)
                self.log("endpoint ready" if ready else "endpoint not ready", endpoint=url)

    def serves(self, model: str) -> bool:
        """Of an empty pool nobody can say that it does not serve a model: endpoints may be about to come."""
        return not self.workers or super().serves(model)

    def saturated(self, model: str, now: float) -> bool:
        """Whether every endpoint for the model says itself that it has enough, as the reference picker reads
        it: by requests that wait there, or by KV cache in use. Needs `metrics_interval`."""
        settings = self.settings
        for url in self.allowed(model, now):
            report = self.workers[url].report
            if report is None:
                return False
            waits = (report.waiting or 0) > settings.saturation_queue
            if not waits and (report.kv_usage or 0.0) <= settings.saturation_kv:
                return False
        return True

    def close(self) -> None:
        super().close()
        self.knowledge.close()

    def sent(self, url: str, now: float) -> None:
        if url in self.workers:
            self.workers[url].breaker.sent(now)

    def succeeded(self, url: str) -> None:
        if url in self.workers:
            self.workers[url].breaker.succeeded()

    def failed(self, url: str, now: float) -> None:
        if url in self.workers:
            self.workers[url].breaker.failed(now)

    def released(self, url: str) -> None:
        """The request ended without saying anything of the endpoint (the client left)."""
        if url in self.workers:
            self.workers[url].breaker.released()
