"""The endpoints of a pool: kept in step with discovery, and saturated when they say so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("httptools")

from kvist.gateway.knowledge.load import Report
from kvist.picker.core import Picker
from kvist.picker.endpoints import EndpointFleet
from kvist.picker.flight import Asked, Refused
from kvist.picker.protocol import url_of
from kvist.picker.settings import build

A, B = "127.0.0.1:1", "127.0.0.1:2"


def with_fleet(check: Callable[[EndpointFleet], None], **options: Any) -> None:
    async def run() -> None:
        fleet = EndpointFleet(build(options, "test"), lambda event, **fields: None)
        try:
            check(fleet)
        finally:
            fleet.close()

    asyncio.run(run())


def test_discovery_adds_drains_and_forgets() -> None:
    def check(fleet: EndpointFleet) -> None:
        fleet.replace({A: True, B: False}, 0.0)
        assert set(fleet.workers) == {url_of(A)}  # one that was never ready is not there yet
        state = fleet.router.worker(url_of(A))
        state.routed = 7
        fleet.replace({A: False, B: True}, 1.0)
        assert fleet.allowed("", 1.0) == {url_of(B)}
        fleet.replace({A: True, B: True}, 2.0)
        assert fleet.allowed("", 2.0) == {url_of(A), url_of(B)}
        assert fleet.router.worker(url_of(A)).routed == 7  # what was learned stays
        fleet.replace({B: True}, 3.0)
        assert set(fleet.workers) == {url_of(B)}
        for told in (fleet.succeeded, fleet.released):
            told(url_of(A))  # of a request that ends after its endpoint has gone
        fleet.failed(url_of(A), 3.0)
        fleet.sent(url_of(A), 3.0)

    with_fleet(check)


def test_an_empty_pool_is_not_ready_rather_than_without_the_model() -> None:
    def check(fleet: EndpointFleet) -> None:
        picker = Picker(fleet.settings, fleet, lambda: 0.0)
        asked = Asked("/v1/completions", body=b'{"model":"m","prompt":"x"}')
        with pytest.raises(Refused) as refused:
            picker.ask(asked, 0.0)
        assert refused.value.status == 503
        fleet.replace({A: True}, 0.0)
        fleet.workers[url_of(A)].models = frozenset({"other"})
        with pytest.raises(Refused) as refused:
            picker.ask(asked, 0.0)
        assert refused.value.status == 404

    with_fleet(check)


@pytest.mark.parametrize(
    ("first", "second", "full"),
    [
        (Report(waiting=6), Report(kv_usage=0.9), True),
        (Report(waiting=6), Report(waiting=5, kv_usage=0.8), False),
        (Report(waiting=6), Report(), False),
        (Report(waiting=6), None, False),
    ],
)
def test_saturated_is_when_all_have_enough(first: Report, second: Report | None, full: bool) -> None:
    def check(fleet: EndpointFleet) -> None:
        fleet.replace({A: True, B: True}, 0.0)
        fleet.workers[url_of(A)].report, fleet.workers[url_of(B)].report = first, second
        assert fleet.saturated("", 0.0) is full

    with_fleet(check)


def test_failures_in_a_row_open_the_breaker() -> None:
    def check(fleet: EndpointFleet) -> None:
        fleet.replace({A: True, B: True}, 0.0)
        for _ in range(3):
            fleet.failed(url_of(A), 0.0)
        assert fleet.allowed("", 1.0) == {url_of(B)}
        assert fleet.allowed("", 11.0) == {url_of(A), url_of(B)}  # one may try
        fleet.sent(url_of(A), 11.0)
        assert fleet.allowed("", 11.0) == {url_of(B)}
        fleet.succeeded(url_of(A))
        assert fleet.allowed("", 11.0) == {url_of(A), url_of(B)}

    with_fleet(check, cb_failure_threshold=3, cb_timeout_duration=10.0)
