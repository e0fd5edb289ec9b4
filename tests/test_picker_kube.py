"""Discovery by an InferencePool, against a fake API server: `kvist picker --pool-name` as a real process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_asyncio")
pytest.importorskip("envoy.service.ext_proc.v3")
pytest.importorskip("httptools")

from fake_kube import OBJECTIVES, PODS, POOLS, FakeKube
from gateway_processes import call, wait_for

from kvist.demo.processes import Child
from kvist.picker.kube import endpoints_of, ready


@pytest.fixture
def kube() -> Iterator[FakeKube]:
    fake = FakeKube()
    yield fake
    fake.stop()


@pytest.fixture
def picker(kube: FakeKube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    path = tmp_path / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "clusters": [{"name": "test", "cluster": {"server": kube.url}}],
                "users": [{"name": "test", "user": {}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(path))
    child = Child(
        "picker",
        "--grpc-port=0",
        "--grpc-health-port=0",
        "--metrics-port=0",
        "--pool-name=llm",
        "--drain-timeout=1",
    )
    yield child
    child.stop()


def url(picker: Child) -> str:
    assert picker.port
    line = next(json.loads(line) for line in picker.lines if '"metrics_port"' in line)
    return f"http://127.0.0.1:{line['metrics_port']}"


def found(picker: Child) -> dict[str, bool]:
    """Endpoints, and whether they are drained."""
    workers = json.loads(call(url(picker), "/workers")[1])["workers"]
    return {w["id"].removeprefix("http://"): w["draining"] for w in workers}


def make_pool(kube: FakeKube, *ports: int, **labels: str) -> None:
    kube.put(
        POOLS,
        "llm",
        spec={
            "selector": {"matchLabels": labels or {"app": "llm"}},
            "targetPorts": [{"number": port} for port in ports or (8000,)],
        },
    )


def test_pods_come_go_and_lose_readiness(kube: FakeKube, picker: Child) -> None:
    kube.pod("a", "127.0.0.2")
    kube.pod("other", "127.0.0.9", app="other")
    assert url(picker)
    assert call(url(picker), "/health")[0] == 503  # nothing is known before the pool is
    make_pool(kube)
    wait_for(lambda: found(picker) == {"127.0.0.2:8000": False})
    assert call(url(picker), "/health")[0] == 200
    kube.pod("b", "127.0.0.3")
    kube.pod("c", "127.0.0.4", ready=False)
    wait_for(lambda: found(picker) == {"127.0.0.2:8000": False, "127.0.0.3:8000": False})
    kube.pod("a", "127.0.0.2", ready=False)
    kube.pod("c", "127.0.0.4")
    wait_for(lambda: found(picker).get("127.0.0.2:8000") is True and "127.0.0.4:8000" in found(picker))
    kube.pod("a", "127.0.0.2")
    wait_for(lambda: found(picker)["127.0.0.2:8000"] is False)
    kube.delete(PODS, "b")
    wait_for(lambda: set(found(picker)) == {"127.0.0.2:8000", "127.0.0.4:8000"})


def test_the_pools_ports_and_labels_may_change(kube: FakeKube, picker: Child) -> None:
    make_pool(kube, 8000, 8001)
    kube.pod("a", "127.0.0.2")
    kube.pod("b", "127.0.0.3", app="new")
    wait_for(lambda: set(found(picker)) == {"127.0.0.2:8000", "127.0.0.2:8001"})
    make_pool(kube, 9000, app="new")
    wait_for(lambda: set(found(picker)) == {"127.0.0.3:9000"})
    kube.delete(POOLS, "llm")
    wait_for(lambda: found(picker) == {})


def test_a_watch_that_ends_expires_or_breaks_starts_over(kube: FakeKube, picker: Child) -> None:
    make_pool(kube)
    kube.pod("a", "127.0.0.2")
    wait_for(lambda: len(found(picker)) == 1)
    for number, fault in enumerate((kube.end_watches, kube.expire)):
        wait_for(lambda: len(kube.watches) == 3)
        before = kube.lists
        fault()
        wait_for(lambda before=before: kube.lists >= before + 3)  # type: ignore[misc]
        kube.pod(f"new{number}", f"127.0.1.{number + 1}")
        wait_for(lambda number=number: len(found(picker)) == 2 + number)  # type: ignore[misc]
    wait_for(lambda: len(kube.watches) == 3)
    kube.down = True
    kube.end_watches()
    wait_for(lambda: any('"watch broke"' in line for line in picker.lines))
    assert len(found(picker)) == 3  # what is known stays known
    kube.objects[PODS].pop("a")
    kube.down = False
    wait_for(lambda: len(found(picker)) == 2)


def test_objectives_give_priorities(kube: FakeKube) -> None:
    """Those of this pool, which flags override."""
    from test_picker_core import make

    from kvist.picker.kube import Pool

    picker, _ = make(1, pool_name="llm", objectives={"chat": 3})

    def objective(priority: int | None, pool: str = "llm") -> dict[str, Any]:
        return {"spec": {"poolRef": {"name": pool}, **({} if priority is None else {"priority": priority})}}

    pool = Pool.__new__(Pool)
    pool.settings, pool.picker = picker.settings, picker
    pool.objectives(
        {
            "batch": objective(-5),
            "plain": objective(None),
            "chat": objective(9),
            "elsewhere": objective(7, "other"),
        }
    )
    assert picker.objectives == {"batch": -5, "plain": 0, "chat": 3}


def test_objectives_are_watched(kube: FakeKube, picker: Child) -> None:
    make_pool(kube)
    kube.pod("a", "127.0.0.2")
    kube.put(OBJECTIVES, "batch", spec={"poolRef": {"name": "llm"}, "priority": -1})
    wait_for(lambda: any(path == OBJECTIVES for path, *_ in kube.watches))
    wait_for(lambda: json.loads(call(url(picker), "/workers")[1])["objectives"] == {"batch": -1})
    kube.delete(OBJECTIVES, "batch")
    wait_for(lambda: json.loads(call(url(picker), "/workers")[1])["objectives"] == {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"10.0.0.1:80": True}),
        ({"podIP": "fd00::1"}, {"[fd00::1]:80": True}),
        ({"podIP": None}, {}),
        ({"phase": "Pending"}, {"10.0.0.1:80": False}),
        ({"phase": "Succeeded"}, {}),
        ({"conditions": []}, {"10.0.0.1:80": False}),
    ],
)
def test_which_pods_are_endpoints(change: dict[str, Any], expected: dict[str, bool]) -> None:
    status = {"podIP": "10.0.0.1", "phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    pod = {"metadata": {"name": "a"}, "status": {**status, **change}}
    assert endpoints_of([pod], [80]) == expected
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"  # type: ignore[index]
    assert not ready(pod)
