"""Workers that come and go with their sources: settings, names, pods."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gateway_processes import Process, call, engine, fake, state, wait_for

from kvist.gateway.discovery import names
from kvist.gateway.discovery.discovery import Discovery
from kvist.gateway.discovery.membership import Membership
from kvist.gateway.discovery.pods import workers_of
from kvist.gateway.fleet import Fleet
from kvist.gateway.settings import Settings, WorkerSpec
from kvist.prefix.index import PrefixIndex
from kvist.routing import make_policy


def in_a_fleet(work: Callable[[Fleet, Membership, list[dict[str, Any]]], Any], **settings: Any) -> None:
    """Run `work` with a fleet whose workers nobody answers for, and the log."""

    async def run() -> None:
        given = Settings(health_check_timeout=0.05, **settings)
        log: list[dict[str, Any]] = []
        fleet = Fleet(given, make_policy("lbgr", rng=Random(0)), PrefixIndex(unit=1))
        membership = Membership(
            fleet, lambda: 0.0, lambda event, **fields: log.append({"event": event, **fields})
        )
        try:
            done = work(fleet, membership, log)
            if done is not None:
                await done
        finally:
            fleet.close()
            await asyncio.sleep(0)

    asyncio.run(run())


def specs(*ports: int) -> list[WorkerSpec]:
    return [WorkerSpec(url=f"http://127.0.0.1:{port}") for port in ports]


def ports(fleet: Fleet) -> list[int]:
    return sorted(int(url.rsplit(":", 1)[1]) for url in fleet.workers)


def test_sources_do_not_touch_each_others_workers() -> None:
    def work(fleet: Fleet, membership: Membership, log: list[dict[str, Any]]) -> None:
        fleet.add("http://127.0.0.1:9", 0.0)
        membership.update("a", specs(1, 2))
        membership.update("b", specs(2, 3))
        assert ports(fleet) == [1, 2, 3, 9]
        membership.update("a", specs(1))
        assert ports(fleet) == [1, 2, 3, 9], "another source names it still"
        membership.update("b", [])
        assert ports(fleet) == [1, 9]
        membership.update("a", specs(1, 4), resting={"http://127.0.0.1:1", "http://127.0.0.1:4"})
        assert ports(fleet) == [1, 9] and fleet.workers["http://127.0.0.1:1"].draining
        membership.update("a", specs(1, 4))
        assert ports(fleet) == [1, 4, 9] and not fleet.workers["http://127.0.0.1:1"].draining
        membership.update("a", [WorkerSpec(url="nonsense")])
        assert ports(fleet) == [9] and log[-1]["event"] == "worker refused"
        with pytest.raises(ValueError):
            membership.update("a", [WorkerSpec(url="nonsense")], strict=True)

    in_a_fleet(work)


def test_a_name_is_looked_up_again_and_keeps_its_workers_while_it_does_not_resolve() -> None:
    answers: list[list[str] | OSError] = [["10.0.0.1", "::1"], OSError("no"), [], ["10.0.0.2"]]

    async def resolve(host: str) -> list[str]:
        assert host == "svc.local"
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    seen = []

    async def work(fleet: Fleet, membership: Membership, log: list[dict[str, Any]]) -> None:
        spec = WorkerSpec(url="dns+http://svc.local:80/base/", data_parallel_size=2)
        task = asyncio.ensure_future(names.follow(spec, membership, 0.01, membership.log, resolve))
        for _ in range(5000):
            await asyncio.sleep(0.002)
            if not seen or seen[-1] != sorted(fleet.workers):
                seen.append(sorted(fleet.workers))
            if not answers:
                break
        await asyncio.sleep(0.02)
        seen.append(sorted(fleet.workers))
        task.cancel()
        assert any(entry["event"] == "name does not resolve" for entry in log)

    in_a_fleet(work)
    assert next(found for found in seen if found) == ["http://10.0.0.1:80/base", "http://[::1]:80/base"]
    assert seen[-1] == ["http://10.0.0.2:80/base"] and [] not in seen[1:]


def test_settings_that_change_start_and_end_look_ups() -> None:
    async def work(fleet: Fleet, membership: Membership, log: list[dict[str, Any]]) -> None:
        discovery = Discovery(membership, membership.log)

        async def until(*wanted: int) -> None:
            for _ in range(5000):
                if ports(fleet) == sorted(wanted):
                    return
                await asyncio.sleep(0.01)
            raise AssertionError(f"{ports(fleet)}, not {wanted}")

        def apply(*urls: str) -> None:
            discovery.apply(Settings(worker_urls=list(urls)))
            discovery.follow_names(Settings(worker_urls=list(urls)))

        apply("http://127.0.0.1:1", "dns+http://127.0.0.1:2")
        await until(1, 2)
        apply("http://127.0.0.1:3", "dns+http://127.0.0.1:2")
        await until(2, 3)
        apply("dns+http://127.0.0.1:4")
        await until(4)
        apply()
        await until()
        discovery.close()

    in_a_fleet(work)


def test_names_must_be_plain_http() -> None:
    for url in ("dns+https://a:1", "dns+a"):
        with pytest.raises(ValueError, match=r"dns\+http://HOST:PORT"):
            Settings(worker_urls=[url])


def test_a_name_serves_requests() -> None:
    worker = fake()
    port = worker.url.rsplit(":", 1)[1]
    gateway = Process("-m", "kvist", "serve", "--port=0", f"--worker-urls=dns+http://127.0.0.1:{port}")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        body = {"messages": [{"role": "user", "content": "x"}]}
        assert call(gateway.url, "/v1/chat/completions", body)[0] == 200
        assert [row["id"] for row in state(gateway.url)["workers"]] == [worker.url]
    finally:
        gateway.stop()
        worker.stop()


def test_a_reload_takes_over_the_settings_workers_alone(tmp_path: Path) -> None:
    engines = [engine() for _ in range(3)]
    config = tmp_path / "gateway.toml"
    config.write_text(f'[serve]\nport = 0\nworker_urls = ["{engines[0].url}"]\n')
    gateway = Process("-m", "kvist", "serve", f"--config={config}")
    try:
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        assert call(gateway.url, "/workers", {"url": engines[2].url})[0] == 201
        config.write_text(f'[serve]\nport = 0\nworkers = [{{url = "{engines[1].url}/"}}]\n')
        gateway.signal(signal.SIGHUP)

        def urls() -> set[str]:
            return {row["id"] for row in state(gateway.url)["workers"]}

        wait_for(lambda: urls() == {engines[1].url, engines[2].url})
        config.write_text("port = [")
        gateway.signal(signal.SIGHUP)
        wait_for(lambda: any("reload failed" in line for line in gateway.lines))
        assert urls() == {engines[1].url, engines[2].url}
    finally:
        for process in [gateway, *engines]:
            process.stop()


def pod(ip: str | None, ready: bool = True, phase: str = "Running", **metadata: Any) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}]
    return {"metadata": metadata, "status": {"podIP": ip, "phase": phase, "conditions": conditions}}


def test_pods_are_workers_once_they_have_an_address_and_until_they_end() -> None:
    settings = Settings(
        service_discovery_port=80, tokenizer=["embedded"], kv_events=["5557"], data_parallel_size=2
    )
    pods = {
        "a": pod("10.0.0.1"),
        "b": pod("fd00::1", ready=False),
        "c": pod(None),
        "d": pod("10.0.0.4", phase="Succeeded"),
        "e": pod("10.0.0.5", deletionTimestamp="2026-01-01T00:00:00Z"),
    }
    found, resting = workers_of(pods, settings)
    assert [spec.url for spec in found] == ["http://10.0.0.1:80", "http://[fd00::1]:80", "http://10.0.0.5:80"]
    assert resting == {"http://[fd00::1]:80", "http://10.0.0.5:80"}
    assert {(spec.kv_events, spec.data_parallel_size) for spec in found} == {("5557", 2)}


def test_pods_come_and_go(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes_asyncio")
    from fake_kube import PODS, FakeKube

    kube, worker = FakeKube(), fake()
    kubeconfig = tmp_path / "kubeconfig"
    context = {"name": "test", "context": {"cluster": "test", "user": "test"}}
    cluster = {"name": "test", "cluster": {"server": kube.url}}
    users = [{"name": "test", "user": {}}]
    head = {"apiVersion": "v1", "kind": "Config", "current-context": "test"}
    kubeconfig.write_text(json.dumps({**head, "contexts": [context], "clusters": [cluster], "users": users}))
    gateway = Process(
        *("-m", "kvist", "serve", "--port=0", "--service-discovery", "--selector=app=llm"),
        *(f"--kubeconfig={kubeconfig}", f"--service-discovery-port={worker.url.rsplit(':', 1)[1]}"),
    )

    def found() -> dict[str, bool]:
        rows = state(gateway.url)["workers"]
        return {row["id"].split("//")[1].split(":")[0]: row["draining"] for row in rows}

    try:
        kube.pod("one", "127.0.0.1")
        kube.pod("foreign", "127.0.0.9", app="other")
        wait_for(lambda: found() == {"127.0.0.1": False})
        wait_for(lambda: call(gateway.url, "/health")[0] == 200)
        body = {"messages": [{"role": "user", "content": "x"}]}
        assert call(gateway.url, "/v1/chat/completions", body)[0] == 200
        kube.pod("two", "127.0.0.2")
        kube.pod("one", "127.0.0.1", ready=False)
        wait_for(lambda: found() == {"127.0.0.1": True, "127.0.0.2": False})
        kube.delete(PODS, "two")
        wait_for(lambda: found() == {"127.0.0.1": True})
    finally:
        for process in (gateway, worker):
            process.stop()
        kube.stop()
