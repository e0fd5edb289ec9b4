"""Discovery in Kubernetes: an InferencePool names pods by labels, InferenceObjectives have the priorities.

Needs `kvist[kubernetes]`. Each kind is listed and then watched from there; a watch that breaks starts over,
and endpoints that are known stay while the API server does not answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvist.gateway.discovery.kubernetes import connect, follow, ready
from kvist.picker.core import Picker
from kvist.picker.endpoints import EndpointFleet
from kvist.picker.protocol import endpoint
from kvist.picker.server import Services
from kvist.picker.settings import PickerSettings

OBJECTIVE_GROUP, OBJECTIVE_VERSION = "inference.networking.x-k8s.io", "v1alpha2"
POOL_VERSION = "v1"


def endpoints_of(pods: Iterable[Mapping[str, Any]], ports: Iterable[int]) -> dict[str, bool]:
    """`ip:port` of every pod that has an address, and whether it is ready; ended pods are left out."""
    found = {}
    ports = list(ports)
    for pod in pods:
        status = pod.get("status") or {}
        ip = status.get("podIP")
        if not ip or status.get("phase") in ("Succeeded", "Failed"):
            continue
        host = f"[{ip}]" if ":" in ip else ip
        for port in ports:
            found[endpoint(f"{host}:{port}")] = ready(pod)
    return found


class Pool:
    """What is known of the pool; tells the fleet whenever it changes."""

    def __init__(self, settings: PickerSettings, picker: Picker, fleet: EndpointFleet) -> None:
        self.settings = settings
        self.picker = picker
        self.fleet = fleet
        self.labels: dict[str, str] = {}
        self.ports: list[int] = []
        self.pods: dict[str, Mapping[str, Any]] = {}
        self.selected = asyncio.Event()  # set whenever the labels change

    def pool(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        spec = (seen.get(self.settings.pool_name) or {}).get("spec") or {}
        labels = dict((spec.get("selector") or {}).get("matchLabels") or {})
        self.ports = [int(port["number"]) for port in spec.get("targetPorts") or []]
        if labels != self.labels:
            self.labels, self.pods = labels, {}
            self.selected.set()
        self._tell()

    def select(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        self.pods = dict(seen)
        self._tell()

    def objectives(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        """Those of this pool; flags and files win."""
        found = {
            name: int(spec.get("priority") or 0)
            for name, item in seen.items()
            if ((spec := item.get("spec") or {}).get("poolRef") or {}).get("name") == self.settings.pool_name
        }
        self.picker.objectives = {**found, **self.settings.objectives}

    def _tell(self) -> None:
        self.fleet.replace(endpoints_of(self.pods.values(), self.ports), time.monotonic())


async def watch_pool(
    settings: PickerSettings,
    picker: Picker,
    fleet: EndpointFleet,
    services: Services,
    log: Callable[..., None],
    client: Any = None,
) -> None:
    """Follow the pool for ever. `client`: a kubernetes_asyncio ApiClient; without one the pod's own
    credentials, else the kubeconfig. Raises ValueError if there are neither."""
    try:
        from kubernetes_asyncio import client as api
    except ModuleNotFoundError:
        raise ValueError("--pool-name needs kubernetes-asyncio: pip install 'kvist[kubernetes]'") from None
    client = client or await connect()
    pool = Pool(settings, picker, fleet)
    custom, core = api.CustomObjectsApi(client), api.CoreV1Api(client)
    space = settings.pool_namespace

    async def pools() -> None:
        await follow(
            custom.list_namespaced_custom_object,
            (settings.pool_group, POOL_VERSION, space, "inferencepools"),
            {"field_selector": f"metadata.name={settings.pool_name}"},
            pool.pool,
            log,
        )

    async def objectives() -> None:
        await follow(
            custom.list_namespaced_custom_object,
            (OBJECTIVE_GROUP, OBJECTIVE_VERSION, space, "inferenceobjectives"),
            {},
            pool.objectives,
            log,
        )

    async def pods() -> None:
        while True:
            pool.selected.clear()
            task = None
            if pool.labels:
                selector = ",".join(f"{key}={value}" for key, value in pool.labels.items())

                def seen(items: Mapping[str, Mapping[str, Any]]) -> None:
                    pool.select(items)
                    services.set_ready(True)

                task = asyncio.ensure_future(
                    follow(core.list_namespaced_pod, (space,), {"label_selector": selector}, seen, log)
                )
            await pool.selected.wait()
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    try:
        await asyncio.gather(pools(), objectives(), pods())
    finally:
        await client.close()
